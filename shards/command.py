"""How every command runs and ends: stop signals, its output, errors in one line, exit codes.

Imports nothing heavy: the handlers are in place before numpy or torch is imported, which takes
seconds in which a signal may come.

Exit codes: 0 done; 1 done, with faults that its lines name, or a rank lost; 2 an error in one line
(bad input, a full disk); 75 preempted, the same command resumes; 130 Ctrl-C, with nothing to keep;
128 + N another signal N, or a second one.
"""

import atexit
import ctypes
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FAILED, USAGE, PREEMPTED, INTERRUPTED = 1, 2, 75, 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
JOINERS = "\u200c\u200d"  # invisible, but letters of Persian and of emoji
REPEAT_S = 3.0  # schedulers and launchers both pass a signal on: that is still the first one


class Stopped(KeyboardInterrupt):
    """A stop signal while there is nothing to save."""


class StopRequest:
    """The first stop signal; a second one, seconds later, ends the process at once.

    While a program starts, the first one ends the process there and then: an exception would have
    to find its way through the imports of libraries. Later it is raised as `Stopped`.
    """

    def __init__(self, *, code: int | None = None) -> None:
        self.signal: str | None = None
        self.where = ""  # what the program does, as "while packing"; "" while it starts
        self.code = INTERRUPTED if code is None else code  # of a process that the signal has ended
        self._is_code_given = code is not None
        self.is_raised = False  # as `Stopped`, whatever a library has made of that since
        self.is_quiet = False  # another rank's line is enough
        self._first_s = 0.0

    def install(self) -> None:
        """Handles signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def line(self, signalled: object = None) -> str:
        """What became of the program. signalled: the signal, where another process got it."""
        where = self.where or "while starting; nothing was done"
        return f"{self.signal or signalled}: stopped {where}"

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._first_s > REPEAT_S:
                name = signal.Signals(number).name
                _end_now(f"{name}: a second signal, ended at once\n", 128 + number)
            return
        self.signal, self._first_s = signal.Signals(number).name, now
        if not self._is_code_given:
            self.code = 128 + number
        self._first()

    def _first(self) -> None:
        if not self.where:
            _end_now("" if self.is_quiet else f"{self.line()}\n", self.code)
        self.is_raised = True
        raise Stopped(self.signal)


class _Stream(io.FileIO):
    """A standard stream whose reader may go, as `head` does, or whose disk may be full.

    The work goes on without its lines. A reader that went wanted no more of them; lines that found
    no room are an error at the end (`lost`).
    """

    lost: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.lost = self.lost or error
            with suppress(OSError):  # what libraries write goes the same way
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes


_streams: list[_Stream] = []


def open_output() -> None:
    """Makes the standard streams outlive their reader, and take any sign in any encoding."""
    sys.stdout, sys.stderr = _opened(sys.stdout, 1), _opened(sys.stderr, 2)


def _opened(stream: TextIO, number: int) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
        return stream  # closed, or a test's
    stream.flush()
    raw = _Stream(number, "wb", closefd=False)
    _streams.append(raw)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def is_printable(text: str) -> bool:
    """Whether a text is one line that a terminal shows and does not obey."""
    return all(c.isprintable() or c in JOINERS for c in text)


def escape(text: str) -> str:
    """A text in one line of a terminal, whatever is in it."""
    return "".join(c if is_printable(c) else ascii(c)[1:-1] for c in text)


def words(error: BaseException) -> str:
    """An error in one line of a terminal: the file where it names one, and the reason in words."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return escape(f"{os.fsdecode(error.filename)}: {error.strerror}")
    if isinstance(error, OSError) and error.errno and error.strerror:
        return error.strerror
    return escape(" ".join(str(error).split())) or type(error).__name__


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; bad input or a full disk is one line, and USAGE."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"error: {words(error)}", file=sys.stderr)
        return USAGE


def end(code: int) -> NoReturn:
    """Ends the process with this code; where lines of its output found no room, not with 0.

    Threads end and exit handlers run as at any end, and no signal changes anything any more; but
    the interpreter does not take a thousand modules apart, which takes a second.
    """
    _flush()
    if lost := [raw.lost for raw in _streams if raw.lost is not None]:
        with suppress(OSError):
            print(f"error: the output cannot be written: {lost[0].strerror}", file=sys.stderr)
        code = code or USAGE
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
    ctypes.CDLL(None).fflush(None)  # what libraries of C have printed
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def listen() -> None:
    """From here on a signal ends the process in one line, until a program handles it by itself."""
    StopRequest().install()


def run(module: str, where: str) -> NoReturn:
    """Runs `main()` of a module, which returns an exit code, and ends the process with it.

    where: what it does when a signal comes, as "while packing".
    """
    stop = StopRequest()
    stop.install()
    open_output()
    try:
        main: Callable[[], int] = import_module(module).main
        stop.where = where
        code = main()
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        if not stop.is_raised:
            raise
        print(stop.line(), file=sys.stderr)
        code = stop.code
    end(code)


def pack() -> NoReturn:
    """The program dan-pack."""
    run("shards.pack", "while packing; the same command continues where it was")


def verify() -> NoReturn:
    """The program dan-verify."""
    run("shards.verify", "while verifying")


def show() -> NoReturn:
    """The program dan-show."""
    run("shards.show", "while drawing sheets")


def align() -> NoReturn:
    """The program python -m shards.align."""
    run("shards.align", "while searching for faces; nothing was written")


def _end_now(line: str, code: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))
    os._exit(code)
