"""How a run is asked to stop. Imports nothing heavy: the handlers are in place before torch is."""

import ctypes
import os
import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_S = 3.0  # schedulers and launchers both pass a signal on: that is still the first one
PREEMPTED = 75  # exit code (EX_TEMPFAIL); of a worker under a launcher it would be taken as failure
STOP_FILE = "DAN_STOP_FILE"  # names a file that exists once all are to stop

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Stopped(KeyboardInterrupt):
    """A stop signal while there is nothing to save yet."""


class StopRequest:
    """The first stop signal; a second one, seconds later, ends the process at once.

    Until `wait_for_step` is set, that is before training, the first one ends it too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.wait_for_step = False
        self.step: int | None = None  # at which training is
        self._first_s = 0.0

    def install(self) -> None:
        """Handles signals from now on; an earlier one is known by the file that STOP_FILE names."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        if (path := os.environ.get(STOP_FILE)) and Path(path).exists():
            self._handle(signal.SIGUSR1, None)

    def raise_if_signalled(self) -> None:
        """From here on a signal ends the process at once; so does one that has come already.

        Raises:
            Stopped: a signal has come.
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


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
