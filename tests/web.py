"""A web server of a folder, which lies where a test wants it to."""

import http.server
import socketserver
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

CHUNK = b"{" * 2**16
# An answer's fault: a status, or one of these.
ILLS: tuple[str | int, ...] = (
    "endless", "cut", "slow", "silent", "other", "flipped", "short", "long", "negative", "range",
    "packed", "garbage", "nothing", "round", 500, 503, 429, 404, 403, 204, 301,
)  # fmt: skip
LENGTHS = {"short": -7, "long": 7}  # that the header has more than the body


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
        try:
            if isinstance(ill, int) or not path.is_file():
                self.send_error(ill if isinstance(ill, int) else 404)
            else:
                self._answer(ill, path.read_bytes())
        except OSError:
            self.close_connection = True

    def _answer(self, ill: str, content: bytes) -> None:
        if ill == "nothing":
            return
        if ill == "garbage":
            self.wfile.write(CHUNK[:1000])
            return
        if ill == "round":  # a redirection to itself
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        self.send_response(206 if ill == "range" else 200)
        if ill == "negative":
            self.send_header("Content-Length", "-5")
        elif ill not in ("endless", "packed"):
            length = len(content) // 2 if ill == "range" else len(content)
            self.send_header("Content-Length", str(length + LENGTHS.get(ill, 0)))
        if ill == "range":
            self.send_header("Content-Range", f"bytes 5-{5 + length}/{len(content)}")
        if ill == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self._send(ill, content)

    def _send(self, ill: str, content: bytes) -> None:
        server: Server = self.server  # type: ignore[assignment]
        if ill == "endless":
            while True:
                self.wfile.write(CHUNK)
                server.sent += len(CHUNK)
        elif ill == "packed":  # a thousand times as many bytes as are sent
            pack = zlib.compressobj(wbits=31)
            for _ in range(2**12):
                self.wfile.write(pack.compress(CHUNK))
            self.wfile.write(pack.flush())
        elif ill == "slow":  # some bytes come all the time, all of them late
            for k in range(12):
                self.wfile.write(content[k * len(content) // 12 : (k + 1) * len(content) // 12])
                time.sleep(0.1)
        elif ill == "silent":
            server.over.wait(10)
        elif ill == "flipped":
            middle = len(content) // 2
            self.wfile.write(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        else:
            parts = {"cut": content[:100], "other": CHUNK[: len(content)].ljust(len(content)),
                     "range": content[5 : 5 + len(content) // 2]}  # fmt: skip
            self.wfile.write(parts.get(ill, content))


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
