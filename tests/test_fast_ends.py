"""What programs spare themselves: collections while they import, and being taken apart."""

import gc
from pathlib import Path

import pytest
from test_ends import python

from dan_dist.run import cli

ENDING = """
import atexit, ctypes, threading, time
from shards.command import end, open_output
class Last:
    def __del__(self):
        print("taken apart")
last = Last()
atexit.register(print, "exit handler")
open_output()
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
ctypes.CDLL(None).printf(b"C\\n")
print("main", end=" ")
end(3)
"""


def test_threads_handlers_and_buffers_come_before_the_end(tmp_path: Path) -> None:
    done = python("-c", ENDING, cwd=tmp_path, PYTHONUNBUFFERED="")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "main thread\nexit handler\nC\n"  # and no module is taken apart


def test_the_collector_leaves_alone_what_is_imported() -> None:
    before = gc.get_freeze_count()
    with cli.imports():
        assert not gc.isenabled()
        kept = [[k] for k in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() - before >= len(kept)


UNEXPECTED = """
from dan_dist.run import cli
def main(arguments, stop):
    with cli.imports():
        import torch._dynamo
    raise RuntimeError("odd")
cli.run(main)
"""


@pytest.mark.slow
def test_an_unexpected_error_is_a_traceback_and_no_more(tmp_path: Path) -> None:
    """Libraries report what is frozen as leaked, where the interpreter takes itself apart."""
    done = python("-c", UNEXPECTED, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert lines[0].startswith("Traceback") and lines[-1] == "RuntimeError: odd"
