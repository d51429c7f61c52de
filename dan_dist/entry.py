"""What every program of launch/ does around its work: signals, who speaks, errors, exit codes.

Imports nothing heavy: the stop signals' handlers are in place before torch is imported, which
takes seconds in which a signal may come.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dan_dist.stop import Stopped, StopRequest, end_with_parent, has_launcher

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; see dan_dist/stop.py for the others
RANK_0_FIRST_S = 5.0


def run(main: Callable[[list[str], StopRequest], int]) -> NoReturn:
    """Runs `main(arguments, stop)` on this rank and exits with the code that it returns.

    Bad input (ValueError, OSError) and a loss that is not finite end in one line and code 2,
    a lost rank in one line and code 1; DAN_TRACEBACK=1 shows where they were noticed.
    """
    if has_launcher():
        end_with_parent()  # instead of working on unwatched, in a folder that a successor wants
    stop = StopRequest()
    try:
        stop.install()
        sys.exit(_speaking(main, sys.argv[1:], stop))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}: stopped before or after the work", file=sys.stderr)
        sys.exit(0 if has_launcher() else INTERRUPTED)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The arguments of a program that takes a trained network: `checkpoint` and `--classes`."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder (its best)")
    parser.add_argument(
        "--classes",
        help="of a file in the authors' format, which does not name them: affectnet8, affectnet7, "
        "rafdb, sfew, or the names in label order with commas",
    )


def _speaking(
    main: Callable[[list[str], StopRequest], int], arguments: list[str], stop: StopRequest
) -> int:
    """Rank 0 speaks; the others only when something is wrong."""
    rank = int(os.environ.get("RANK", 0))
    prefix = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(format=f"{prefix}%(message)s", stream=sys.stdout, force=True)
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
        # Rank 0 mostly fails of the same and says so; torchrun then ends this process. Where
        # it does not, this rank alone knows what is wrong.
        until_s = time.monotonic() + RANK_0_FIRST_S
        while rank and time.monotonic() < until_s:
            if stop.signal is not None:
                return FAILED
            time.sleep(0.1)
        print(f"error: {prefix}{error}", file=sys.stderr, flush=True)
        return FAILED if isinstance(error, ConnectionError) else USAGE
