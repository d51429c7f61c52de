"""How a run is asked to stop. Imports nothing heavy: the handlers are in place before torch is."""

import ctypes
import os
import signal
from pathlib import Path

from shards import command
from shards.command import PREEMPTED, SIGNALS, Stopped

__all__ = ["PREEMPTED", "SIGNALS", "STOP_FILE", "StopRequest", "Stopped", "end_with_parent"]

STOP_FILE = "DAN_STOP_FILE"  # names a file that exists once all are to stop

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class StopRequest(command.StopRequest):
    """The first stop signal; a second one, seconds later, ends the process at once.

    Until `wait_for_step` is set, that is before training, the first one ends it too.
    """

    def __init__(self, *, code: int | None = command.INTERRUPTED) -> None:
        super().__init__(code=code)
        self.wait_for_step = False
        self.step: int | None = None  # at which training is

    def install(self) -> None:
        """Handles signals from now on; an earlier one is known by the file that STOP_FILE names."""
        super().install()
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

    def _first(self) -> None:
        if not self.wait_for_step:
            super()._first()


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
