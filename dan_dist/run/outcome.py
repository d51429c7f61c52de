"""How a run ended: `outcome.json` in its folder, which scripts read.

torchrun's exit codes do not distinguish a preempted worker from a finished or a failed one.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from dan_dist.redaction import redact
from shards.files import write_atomically

OUTCOME = "outcome.json"
RESERVE = f"{OUTCOME}.reserve"  # room for it on a disk that has become full
ROOM = 4096  # bytes

Status = Literal["finished", "preempted", "failed"]


def open_outcome(folder: Path) -> None:
    """Takes an earlier run's outcome away; its place on the disk is kept for this run's."""
    with suppress(FileNotFoundError):
        (folder / OUTCOME).replace(folder / RESERVE)
    with suppress(OSError):
        (folder / RESERVE).write_bytes(b" " * ROOM)


def write_outcome(
    folder: Path, status: Status, *, step: int | None, reason: str,
    result: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes `folder`/outcome.json; on a full disk, in the place that was kept for it.

    result: the figures of a finished run, few enough for that place.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reason = redact(reason)
    content = {"status": status, "step": step, "reason": reason, "time_s": round(time.time(), 3),
               **({"result": dict(result)} if result else {})}  # fmt: skip
    try:
        write_atomically(folder / OUTCOME, json.dumps(content) + "\n")
    except OSError:  # in place, on blocks that are this file's already
        with (folder / RESERVE).open("r+b") as file:
            file.write(json.dumps(content | {"reason": reason[:400]}).encode().ljust(ROOM))
        (folder / RESERVE).replace(folder / OUTCOME)
    with suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)


def write_failure(folder: Path, *, step: int | None, reason: str, since_s: float) -> None:
    """Writes that the run failed, as far as that is possible; any rank may call it.

    A finished run stays one. Of the failures that ranks write since `since_s` the first stands, as
    the others follow from it.
    """
    found: dict[str, object] = {}
    with suppress(OSError, ValueError):
        found = json.loads((folder / OUTCOME).read_text())
    with suppress(OSError):
        if found.get("status") != "finished" and float(str(found.get("time_s", 0))) < since_s:
            write_outcome(folder, "failed", step=step, reason=reason)
