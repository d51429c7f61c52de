"""Pictures of MLflow's pages, by a real browser (Debian's `chromium`), as the READMEs show them:

    python launch/pictures/screenshots.py FILE.png ADDRESS [--size 1800x1200] [--click TEXT …]

The address is one that `launch/ablate.py` or a training prints. `--click` clicks, one after
another, on what has that text; `--wait` are the seconds that a page has to draw itself.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's code comes first

from shards.command import listen

if __name__ == "__main__":
    listen()  # a signal may come during the imports below

from dan_dist.run.cli import run
from dan_dist.run.signals import StopRequest

# MLflow opens its assistant beside the first page that a browser sees.
PREPARED = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
FIND = """
(() => {
  const found = [...document.querySelectorAll('button, a, [role=tab], [role=menuitem], span, div')]
    .filter(e => e.textContent.trim() === TEXT && e.offsetParent !== null);
  if (!found.length) return null;
  const box = found[found.length - 1].getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()
"""
ANSWER_S = 60.0
LEFT_S = 0.5  # for a toolbar to go


class Browser:
    """A headless chromium, driven by its own protocol over a pipe."""

    def __init__(self, folder: str, width: int, height: int) -> None:
        command = shutil.which("chromium")
        if command is None:
            raise OSError("no chromium here: apt-get install chromium")
        (read, its_write), (its_read, write) = os.pipe(), os.pipe()
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # the descriptors that it looks at
        words = ["bash", "-c", script, "bash", str(its_read), str(its_write), command, "--headless",
                 "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={folder}", f"--window-size={width},{height}",
                 "--remote-debugging-pipe", "about:blank"]  # fmt: skip
        self._process = subprocess.Popen(
            words, pass_fds=(its_read, its_write), stderr=subprocess.DEVNULL
        )
        os.close(its_read)
        os.close(its_write)
        self._in, self._out = os.fdopen(write, "wb", 0), os.fdopen(read, "rb")
        self._count, self._session = 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=PREPARED)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._in.write(json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline_s:
            answer = json.loads(self._read())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise OSError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise TimeoutError(f"{method} was not answered in {ANSWER_S:.0f} s")

    def _read(self) -> bytes:
        letters = bytearray()
        while (letter := self._out.read(1)) not in (b"\0", b""):
            letters += letter
        if not letters:
            raise OSError("chromium has ended")
        return bytes(letters)

    def evaluate(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    def click(self, text: str) -> None:
        """Clicks on the last thing that has this text.

        Raises:
            ValueError: nothing has.
        """
        place = self.evaluate(FIND.replace("TEXT", json.dumps(text)))
        if place is None:
            raise ValueError(f"nothing with the text {text!r} is on the page")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1],
                      button="left", clickCount=1)  # fmt: skip

    def leave(self) -> None:
        """Takes away the mouse and the charts' toolbars, which stay without one too."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        self.evaluate("document.querySelectorAll('.modebar').forEach(e => e.remove())")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def main(arguments: list[str], stop: StopRequest) -> int:
    """Writes the picture of a page.

    Raises:
        ValueError, OSError: no size or text of the page, no browser, or a page without an answer.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("address")
    parser.add_argument("--size", default="1800x1200", help="of the window, in pixels")
    parser.add_argument("--click", action="append", default=[], help="a text to click on")
    parser.add_argument(
        "--wait", type=float, default=8.0, help="seconds, for a page to draw itself"
    )
    options = parser.parse_args(arguments)
    width, by, height = options.size.partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size is {options.size}, expected WIDTHxHEIGHT in pixels")
    stop.where = "while drawing a page"
    with tempfile.TemporaryDirectory(prefix="dan_dist-", ignore_cleanup_errors=True) as folder:
        browser = Browser(folder, int(width), int(height))
        try:
            browser.call("Page.navigate", url=options.address)
            time.sleep(options.wait)
            for text in options.click:
                browser.click(text)
                time.sleep(options.wait / 2)
            browser.leave()
            time.sleep(LEFT_S)
            shown = browser.call("Page.captureScreenshot", format="png")
            options.file.write_bytes(base64.b64decode(shown["data"]))
        finally:
            browser.close()
    return 0


if __name__ == "__main__":
    run(main)
