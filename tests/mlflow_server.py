"""A real MLflow server that can be taken away and comes back at the same address."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interpreter import REPOSITORY, python
from ranks import free_port


class Server:
    """The server and its store, in `folder`.

    interpreter: the real Python where signals to the group must reach all of its processes.
    """

    def __init__(self, folder: Path, interpreter: str | None = None) -> None:
        self.port, self.interpreter = free_port(), interpreter or python()
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [self.interpreter, "-m", "mlflow", "server", "--backend-store-uri", store,
                   "--artifacts-destination", str(self.folder / "artifacts"), "--host",
                   "127.0.0.1", "--port", str(self.port), "--workers", "1"]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                       "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise TimeoutError("mlflow server did not start")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(folder: Path, *, needed: bool) -> Iterator[tuple[str, Server | None]]:
    """MLflow's address: a server where one is to be taken away, else a file."""
    if not needed:
        yield f"sqlite:///{folder / 'mlflow.db'}", None
        return
    server = Server(folder, sys.executable)
    try:
        yield server.uri, server
    finally:
        server.stop()
