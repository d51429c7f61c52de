"""How a run is asked to stop, and how it says that it ended. Imports nothing heavy: the handlers
are in place before torch is.
"""

import ctypes
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Literal

OUTCOME = "outcome.json"
RESERVE = f"{OUTCOME}.reserve"  # room for it on a disk that has become full
ROOM = 4096  # bytes
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_S = 3.0  # schedulers and launchers both pass a signal on: that is still the first one
PREEMPTED = 75  # exit code (EX_TEMPFAIL); of a worker under a launcher it would be taken as failure

_PR_SET_PDEATHSIG = 1  # of Linux's prctl

# What torchrun and DeepSpeed's launcher leave in the environment
_TORCHRUN, _DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_RANK"
STOP_FILE = "DAN_STOP_FILE"  # names a file that says: stop; for who was not there to hear a signal

Status = Literal["finished", "preempted", "failed"]


class Stopped(KeyboardInterrupt):
    """A stop signal while there is nothing to save yet."""


class StopRequest:
    """Notes the first stop signal; a second one, seconds later, ends the process at once.

    Until `wait_for_step` is set, that is before training, the first one ends it too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.wait_for_step = False
        self.step: int | None = None  # at which training is
        self._first_s = 0.0

    def install(self) -> None:
        """Listens from now on; what was to be heard before is read from the file of STOP_FILE."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        if (path := os.environ.get(STOP_FILE)) and Path(path).exists():
            self._handle(signal.SIGUSR1, None)

    def heed(self) -> None:
        """From here on a signal ends the process at once; so does one that has come already.

        Raises:
            Stopped: it has.
        """
        self.wait_for_step = False
        if self.signal is not None:
            raise Stopped(self.signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._first_s > REPEAT_S:
                os._exit(128 + number)
            return
        self.signal, self._first_s = signal.Signals(number).name, now
        if not self.wait_for_step:
            raise Stopped(self.signal)


def has_launcher() -> bool:
    """Whether torchrun, or DeepSpeed's launcher, started this process."""
    return _TORCHRUN in os.environ or is_deepspeed_launched()


def is_deepspeed_launched() -> bool:
    return _DEEPSPEED in os.environ


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def open_outcome(folder: Path) -> None:
    """Takes an earlier run's outcome away; its place on the disk is kept for this run's."""
    with suppress(FileNotFoundError):
        (folder / OUTCOME).replace(folder / RESERVE)
    with suppress(OSError):
        (folder / RESERVE).write_bytes(b" " * ROOM)


def write_outcome(folder: Path, status: Status, *, step: int | None, reason: str) -> None:
    """Says in `folder`/outcome.json how the run ended; scripts read it, as torchrun's exit codes
    tell a preempted worker from neither a finished nor a failed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"status": status, "step": step, "reason": reason, "time_s": round(time.time(), 3)}
    partial = folder / f"{OUTCOME}.{os.getpid()}.partial"
    try:
        partial.write_text(json.dumps(content) + "\n")
    except OSError:  # in place, on blocks that are this file's already
        partial.unlink(missing_ok=True)
        partial = folder / RESERVE
        with partial.open("r+b") as file:
            file.write(json.dumps(content | {"reason": reason[:400]}).encode().ljust(ROOM))
    partial.replace(folder / OUTCOME)
    with suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)


def write_failure(folder: Path, *, step: int | None, reason: str, since_s: float) -> None:
    """Says that the run failed, on any rank and as far as that can be said: a finished run stays
    one, and of what ranks say since `since_s` the first, from which the rest follows, stands.
    """
    found: dict[str, object] = {}
    with suppress(OSError, ValueError):
        found = json.loads((folder / OUTCOME).read_text())
    with suppress(OSError):
        if found.get("status") != "finished" and float(str(found.get("time_s", 0))) < since_s:
            write_outcome(folder, "failed", step=step, reason=reason)
