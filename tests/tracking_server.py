"""MLflow's own server in this process, which can be made to lack endpoints, fail and refuse."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest import mock

STORE = "server.db"  # in the folder that is served
Answer = tuple[int, str]  # status and body


class TrackingServer:
    """Its address, what it was asked for, and what it answers by `faults` instead of MLflow.

    A fault is a part of a path, and a status with a body; it may depend on the request's body.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.asked: list[str] = []
        self.faults: dict[str, Answer | Callable[[bytes], Answer | None]] = {}
        self._app = app
        self.url = ""

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        self.asked.append(path)
        for part, fault in self.faults.items():
            if part in path:
                body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                environ["wsgi.input"] = _Body(body)
                if answer := fault if isinstance(fault, tuple) else fault(body):
                    status = HTTPStatus(answer[0])
                    start(f"{status.value} {status.phrase}", [("Content-Type", "text/html")])
                    return [answer[1].encode()]
        return self._app(environ, start)


class _Body:
    """A request's body, read a second time."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, count: int = -1) -> bytes:
        end = len(self._content) if count < 0 else count
        found, self._content = self._content[:end], self._content[end:]
        return found


@contextmanager
def serve(folder: Path) -> Iterator[TrackingServer]:
    """A server whose store and artifacts lie in `folder`."""
    from mlflow.server import app, constants, handlers
    from werkzeug.serving import WSGIRequestHandler, make_server

    class QuietHandler(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    environment = {
        constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{folder / STORE}",
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: str(folder / "artifacts"),
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    with (
        mock.patch.dict("os.environ", environment),
        mock.patch.object(handlers, "_tracking_store", None),
        mock.patch.object(handlers, "_artifact_repo", None),
        mock.patch.object(handlers, "_model_registry_store", None),
        mock.patch.object(handlers.utils, "set_tracking_uri"),  # it would be this process's
        mock.patch.object(handlers.registry_utils, "set_registry_uri"),
    ):
        server = TrackingServer(app)
        listener = make_server("127.0.0.1", 0, server, True, request_handler=QuietHandler)
        server.url = f"http://127.0.0.1:{listener.server_port}"
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            listener.shutdown()
            listener.server_close()
