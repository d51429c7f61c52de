"""How a run ended: `outcome.json` in its folder, which scripts read.

torchrun's exit codes do not distinguish a preempted worker from a finished or a failed one.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from dan_dist.redaction import redact
from shards.files import locked, read_json, write_atomically

OUTCOME = "outcome.json"
RESERVE = f"{OUTCOME}.reserve"  # room for it on a disk that has become full
ROOM = 4096  # bytes
MOST_BYTES = 2**20
_FORM = {"status": str, "step": int | None, "reason": str, "time_s": int | float}

Status = Literal["finished", "preempted", "failed"]


def keep_room(folder: Path) -> None:
    """Keeps a place on the disk for the outcome of a run that may begin here.

    Raises:
        OSError: there is none, nor an earlier outcome, whose place would do.
    """
    try:
        if not _has_room(folder):
            (folder / RESERVE).write_bytes(b" " * ROOM)
    except OSError as error:
        if not (folder / OUTCOME).exists():
            reason = f"{error.strerror}; nothing of a run could be kept there"
            raise OSError(error.errno, reason, str(folder)) from error


def open_outcome(folder: Path) -> None:
    """Takes an earlier run's outcome away; where no other place was kept, its own is."""
    with suppress(FileNotFoundError):
        if _has_room(folder):
            (folder / OUTCOME).unlink()
        else:
            (folder / OUTCOME).replace(folder / RESERVE)


def _has_room(folder: Path) -> bool:
    path = folder / RESERVE
    return path.is_file() and path.stat().st_size >= ROOM


def write_outcome(
    folder: Path, status: Status, *, step: int | None, reason: str,
    result: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes `folder`/outcome.json; on a full disk, in the place that was kept for it.

    result: the figures of a finished run, few enough for that place.

    Raises:
        OSError: it cannot be written.
    """
    reason = redact(reason)
    content = {"status": status, "step": step, "reason": reason, "time_s": round(time.time(), 3),
               **({"result": dict(result)} if result else {})}  # fmt: skip
    try:
        write_atomically(folder / OUTCOME, _to_json(content))
    except OSError as error:  # in place, on blocks that are this file's already
        text = _to_json(content)
        while len(text) > ROOM and reason:  # a sign has up to six bytes there
            reason = reason[: -max(1, (len(text) - ROOM) // 6)]
            text = _to_json(content | {"reason": reason})
        text = text.ljust(ROOM)
        for path in (folder / RESERVE, folder / OUTCOME):
            with suppress(OSError):
                with path.open("r+b") as file:
                    file.write(text)
                    file.truncate()
                path.replace(folder / OUTCOME)
                return
        raise error
    with suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)


def _to_json(content: Mapping[str, Any]) -> bytes:
    """In one line, the signs of any language as they are: people and scripts read it."""
    return f"{json.dumps(content, ensure_ascii=False)}\n".encode(errors="backslashreplace")


def read_outcome(folder: Path) -> dict[str, Any]:
    """How the run in `folder` ended; empty where it has not.

    Raises:
        ValueError: the file is not an outcome. OSError: it cannot be read.
    """
    try:
        return read_json(folder / OUTCOME, MOST_BYTES, _FORM, _check)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        way_out = "without it, the run counts as one that was killed, and goes on"
        raise ValueError(f"{error}; {way_out}") from error


def _check(found: Mapping[str, Any]) -> None:
    if found["status"] not in get_args(Status):
        raise ValueError(f"status is {found['status']!r}, expected {' or '.join(get_args(Status))}")


def write_failure(folder: Path, *, step: int | None, reason: str, since_s: float) -> None:
    """Writes that the run failed, as far as that is possible; any rank may call it.

    A finished run stays one. Of the failures that ranks write since `since_s` the first stands, as
    the others follow from it.
    """
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = read_outcome(folder)
    is_later = found.get("time_s", -math.inf) >= since_s
    with suppress(OSError):
        if found.get("status") != "finished" and not is_later:
            write_outcome(folder, "failed", step=step, reason=reason)


def write_refusal(folder: Path, *, reason: str, since_s: float) -> None:
    """Writes why a run did not begin; not where another process has the folder.

    reason, since_s: see `write_failure`.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"{folder} is in use"):
            write_failure(folder, step=None, reason=reason, since_s=since_s)
