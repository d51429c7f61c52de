"""The environment of torchrun and DeepSpeed's launcher: the one place that reads it."""

import atexit
import json
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# What each launcher leaves in the environment of its workers
_TORCHRUN, _DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_RANK"


class Launch(NamedTuple):
    """How this process was started; alone, it is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def read_launch() -> Launch:
    """The launch of this process.

    Raises:
        ValueError: a variable is not a whole number, or is not there where another one asks for it,
            or a rank is not below the number of ranks.
    """
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    size = _number("WORLD_SIZE", 1)
    if size > 1 and not os.environ.get("RANK"):
        raise ValueError(
            f"WORLD_SIZE is {size} in the environment, but RANK is not there: set it to "
            f"0 to {size - 1}, another one on each rank, or unset WORLD_SIZE to train alone"
        )
    if local_rank and not (os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")):
        raise ValueError(
            f"LOCAL_RANK is {local_rank} in the environment, but LOCAL_WORLD_SIZE is not there: "
            "set it to the number of ranks on this node"
        )
    # torchrun's name, and that of DeepSpeed's launcher
    local_size = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", 1))
    for name, total in (("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", local_size)):
        if total < 1:
            raise ValueError(f"{name} is {total} in the environment, expected 1 or more")
    for name, value, total in (("RANK", rank, size), ("LOCAL_RANK", local_rank, local_size)):
        if not 0 <= value < total:
            raise ValueError(f"{name} is {value} in the environment, expected 0 to {total - 1}")
    return Launch(rank, local_rank, size, local_size)


def take_local_rank(arguments: Sequence[str]) -> list[str]:
    """A command line without the launcher's own --local-rank, which some launchers put into it.

    Raises:
        ValueError: it is no number, or another than the environment's.
    """
    words, left = iter(arguments), []
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--local-rank", "--local_rank"):
            left.append(word)
            continue
        value = value if equals else next(words, "")
        if os.environ.setdefault("LOCAL_RANK", value) != value or not value.isdecimal():
            raise ValueError(
                f"{option} is {value!r}, LOCAL_RANK is {os.environ['LOCAL_RANK']!r} in the "
                "environment: expected one number"
            )
    return left


def read_address() -> tuple[str, int]:
    """Host and port at which ranks meet.

    Raises:
        ValueError: a variable is not there, or is no port.
    """
    host = os.environ.get("MASTER_ADDR", "")
    port = _number("MASTER_PORT", 0)
    for name, found in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not found:
            raise ValueError(
                f"WORLD_SIZE is {_number('WORLD_SIZE', 1)} in the environment, but {name} is not "
                "there: let torchrun start the ranks, or unset WORLD_SIZE and RANK to train alone"
            )
    if not 1 <= port <= 65535:
        raise ValueError(f"MASTER_PORT is {port} in the environment, expected 1 to 65535")
    return host, port


def has_store() -> bool:
    """Whether torchrun holds the store in which ranks meet; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def report_failure(line: str) -> None:
    """Leaves the reason of a failure for torchrun's summary, in the form of its own `@record`."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        facts = {"timestamp": str(int(time.time())), "py_callstack": line}
        content = {"message": {"message": line, "extraInfo": facts}}
        with suppress(OSError), Path(path).open("x", encoding="utf-8") as file:  # the first stands
            json.dump(content, file)


def give_home() -> None:
    """Gives an account that has neither a home nor a name what libraries look for in imports."""
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:  # a container's or a scheduler's number, in no list of users
        os.environ.setdefault("LOGNAME", str(user))
        if not os.environ.get("HOME"):
            os.environ["HOME"] = home = tempfile.mkdtemp(prefix="dan_dist-home-")
            atexit.register(shutil.rmtree, home, ignore_errors=True)


def has_launcher() -> bool:
    """Whether torchrun, or DeepSpeed's launcher, started this process."""
    return _TORCHRUN in os.environ or is_deepspeed_launched()


def is_deepspeed_launched() -> bool:
    """Whether DeepSpeed's launcher started this process."""
    return _DEEPSPEED in os.environ


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ValueError(f"{name} is {text!r} in the environment, expected a number") from error
