"""What a program of ranks does around its work: log lines, errors, its parser.

Signals, output and exit codes are those of every command: `shards/command.py`. Imports nothing
heavy, as the stop signals' handlers are in place before torch is imported.
"""

import argparse
import gc
import inspect
import logging
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, TextIO, TypeVar, get_args, get_origin, get_type_hints

from dan_dist.redaction import RedactingFormatter, redact, redact_tracebacks
from dan_dist.run.environment import (
    give_home,
    has_launcher,
    read_launch,
    report_failure,
    take_local_rank,
)
from dan_dist.run.signals import Stopped, StopRequest, end_with_parent
from shards.command import FAILED, INTERRUPTED, USAGE, end, open_output, words

RANK_0_FIRST_S = 5.0

T = TypeVar("T")


def run(main: Callable[[list[str], StopRequest], int]) -> NoReturn:
    """Runs `main(arguments, stop)` on this rank and exits with the code that it returns.

    Bad input (ValueError, OSError) and a loss that is not finite end in one line and code 2,
    a lost rank in one line and code 1; DAN_TRACEBACK=1 shows where they were noticed. torchrun's
    summary holds the line too. A rank that a stop signal ends would be a failure for its launcher:
    there its code is 0.
    """
    stop = StopRequest(code=0 if has_launcher() else INTERRUPTED)
    stop.install()
    open_output()
    if has_launcher():
        end_with_parent()  # instead of working on unwatched, in a folder that a successor wants
    redact_tracebacks()
    give_home()
    try:
        code = _exit_code(main, stop)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = FAILED
    end(code)


def _exit_code(main: Callable[[list[str], StopRequest], int], stop: StopRequest) -> int:
    """The code that `main` returns, or that of an error or a signal, whose line is printed."""
    rank = 0
    try:
        arguments = take_local_rank(sys.argv[1:])
        rank = read_launch().rank
        stop.is_quiet = rank > 0
        return _run_logged(main, arguments, stop, rank)
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        if isinstance(error, Stopped) or stop.is_raised:
            if rank == 0:
                print(stop.line(error), file=sys.stderr)
            return stop.code
        if not isinstance(error, (ValueError, OSError, FloatingPointError)):
            report_failure(f"{type(error).__name__}: {redact(words(error))}")
            raise
        return _fail(error, stop, rank)


def _fail(error: Exception, stop: StopRequest, rank: int) -> int:
    """Prints an error's line, rank 0 first, as it mostly fails of the same."""
    line = redact(words(error))
    if rank and not line.startswith("rank "):  # which names the rank that it is about
        line = f"rank {rank}: {line}"
    report_failure(line)
    if os.environ.get("DAN_TRACEBACK"):
        raise error
    stop.wait_for_step = True  # nothing is left that a signal could end
    # torchrun ends this process once rank 0 has failed. Where it does not, this rank alone knows
    # what is wrong.
    until_s = time.monotonic() + RANK_0_FIRST_S
    while rank and time.monotonic() < until_s:
        if stop.signal is not None:
            return FAILED
        time.sleep(0.1)
    print(f"error: {line}", file=sys.stderr, flush=True)
    return FAILED if isinstance(error, ConnectionError) else USAGE


def _run_logged(
    main: Callable[[list[str], StopRequest], int],
    arguments: list[str],
    stop: StopRequest,
    rank: int,
) -> int:
    """Rank 0 logs; the others only when something is wrong."""
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(RedactingFormatter(f"{prefix}%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    for name in ("dan_dist", "shards"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)

    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm():
        return main(arguments, stop)


@contextmanager
def imports() -> Iterator[None]:
    """Around a program's imports, which the collector of cycles leaves alone, now and later.

    It would look through the million objects of torch and its like again and again, for a quarter
    of the start, and find nothing: what is imported stays.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def set_log_lines(*, prefix: str = "", stream: TextIO | None = None) -> None:
    """From now on, log lines have this prefix and go to this stream, by default stdout."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter(f"{prefix}%(message)s"))
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(stream or sys.stdout)


class _Parser(argparse.ArgumentParser):
    """Leaves the reason of a bad command line for torchrun too."""

    def error(self, message: str) -> NoReturn:
        message = redact(message)  # which holds the words of the command line
        report_failure(message)
        super().error(message)


def parse(options: type[T], arguments: Sequence[str]) -> T:
    """The value of a dataclass of `dan_dist.options` that a command line gives.

    A tuple is an argument of several words, a bool a switch, a Literal a choice. A bad command line
    ends the program with argparse's lines and code 2.
    """
    parser = _Parser(
        description=inspect.getdoc(options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(options)
    for field in fields(options):  # type: ignore[arg-type]
        required = field.default is MISSING
        settings = _settings(hints[field.name], required)
        text = field.metadata["help"]
        if field.metadata.get("positional"):
            parser.add_argument(field.name, help=text, **settings)
            continue
        if not required and field.default not in (None, False):
            text += f" (default: {field.default})"
        name = f"--{field.name.replace('_', '-')}"
        default = None if required else field.default
        parser.add_argument(name, help=text, required=required, default=default, **settings)
    found = vars(parser.parse_intermixed_args(list(arguments)))
    return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def _settings(hint: Any, required: bool) -> dict[str, Any]:
    """argparse's settings for a type."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = get_args(hint)[0]
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "type": type(get_args(hint)[0])}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "nargs": "+" if required else "*"}
    return {"type": hint}
