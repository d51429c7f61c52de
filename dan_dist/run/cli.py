"""What every program does around its work: signals, log lines, errors, exit codes, its parser.

Imports nothing heavy: the stop signals' handlers are in place before torch is imported, which
takes seconds in which a signal may come.
"""

import argparse
import inspect
import logging
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, TextIO, TypeVar, get_args, get_origin, get_type_hints

from dan_dist.redaction import RedactingFormatter, redact, redact_tracebacks
from dan_dist.run.environment import has_launcher, read_launch, take_local_rank
from dan_dist.run.signals import Stopped, StopRequest, end_with_parent

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; see dan_dist/run/signals.py for the others
RANK_0_FIRST_S = 5.0

T = TypeVar("T")


def run(main: Callable[[list[str], StopRequest], int]) -> NoReturn:
    """Runs `main(arguments, stop)` on this rank and exits with the code that it returns.

    Bad input (ValueError, OSError) and a loss that is not finite end in one line and code 2,
    a lost rank in one line and code 1; DAN_TRACEBACK=1 shows where they were noticed.
    """
    if has_launcher():
        end_with_parent()  # instead of working on unwatched, in a folder that a successor wants
    redact_tracebacks()
    stop = StopRequest()
    try:
        arguments = take_local_rank(sys.argv[1:])
        rank = read_launch().rank
        stop.install()
        sys.exit(_run_logged(main, arguments, stop, rank))
    except Stopped as stopped:
        if rank == 0:
            print(f"{stopped}: stopped before or after the work", file=sys.stderr)
        sys.exit(0 if has_launcher() else INTERRUPTED)
    except ValueError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(USAGE)


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

    try:
        with logging_redirect_tqdm():
            return main(arguments, stop)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DAN_TRACEBACK"):
            raise
        stop.wait_for_step = True  # nothing is left that a signal could end
        # Rank 0 mostly fails of the same and prints it; torchrun then ends this process. Where
        # it does not, this rank alone knows what is wrong.
        until_s = time.monotonic() + RANK_0_FIRST_S
        while rank and time.monotonic() < until_s:
            if stop.signal is not None:
                return FAILED
            time.sleep(0.1)
        print(f"error: {prefix}{redact(str(error))}", file=sys.stderr, flush=True)
        return FAILED if isinstance(error, ConnectionError) else USAGE


def set_log_lines(*, prefix: str = "", stream: TextIO = sys.stdout) -> None:
    """From now on, log lines have this prefix and go to this stream."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter(f"{prefix}%(message)s"))
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(stream)


def parse(options: type[T], arguments: Sequence[str]) -> T:
    """The value of a dataclass of `dan_dist.options` that a command line gives.

    A tuple is an argument of several words, a bool a switch, a Literal a choice. A bad command line
    ends the program with argparse's lines and code 2.
    """
    parser = argparse.ArgumentParser(
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
