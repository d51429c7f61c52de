"""A web server of a folder, which lies where a test wants it to."""

import http.server
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path

CHUNK = b"{" * 2**16


class Liar(http.server.BaseHTTPRequestHandler):
    """Serves a folder; `Server.ill` gives the fault of an answer by its name and its number."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        name = self.path.rsplit("/", 1)[1]
        server.asked.append(name)
        path = server.folder / name
        ill = server.ill(name, server.asked.count(name))
        if isinstance(ill, int) or not path.is_file():
            return self.send_error(ill if isinstance(ill, int) else 404)
        content = path.read_bytes()
        self.send_response(200)
        if ill in ("", "cut", "slow", "silent"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self._send(ill, content)
        except OSError:
            self.close_connection = True

    def _send(self, ill: str, content: bytes) -> None:
        server: Server = self.server  # type: ignore[assignment]
        if ill == "endless":
            while True:
                self.wfile.write(CHUNK)
                server.sent += len(CHUNK)
        elif ill == "slow":  # some bytes come all the time, all of them late
            for k in range(12):
                self.wfile.write(content[k * len(content) // 12 : (k + 1) * len(content) // 12])
                time.sleep(0.1)
        elif ill == "silent":
            server.over.wait(10)
        else:
            self.wfile.write(content[:100] if ill == "cut" else content)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Liar)
        self.folder, self.asked, self.sent, self.over = folder, list[str](), 0, threading.Event()
        self.ill: Callable[[str, int], str | int] = lambda name, time: ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()
