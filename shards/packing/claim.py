"""The folder that a pack writes into: locked meanwhile, and never one that holds something else."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.files import locked, read_json, write_atomically
from shards.format import MANIFEST, MANIFEST_BYTES
from shards.packing.plan import STATE_BYTES, Plan

STATE, CONTACT_SHEET = "packing.json", "contact_sheet.png"
_OURS = re.compile(
    rf"({STATE}|{MANIFEST}|{CONTACT_SHEET}|index-.+\.npy|.+-\d{{5}}\.(tar|idx|npy|done))"
    r"(\.[0-9a-f]{8}\.partial)?"
)


@contextmanager
def locked_for_packing(out: Path, part: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Keeps a second pack out of the folder; the parts of one pack let each other in.

    The locks end with the process, however it ends. The first one's file stays for good: were it
    removed, two processes might each hold one of that name.
    """
    number, parts = part
    taken = f"--out {out}: another process is packing into it"
    own = out / f"packing-{number}-of-{parts}.lock"
    with locked(out / "packing.lock", taken, shared=parts > 1), locked(own, taken):
        yield


def claim(out: Path, plan: Plan, parts: int, shard_size: int, *, overwrite: bool) -> None:
    """Makes `out` ours: new, continued, or emptied of the files of an earlier pack.

    shard_size: images of a shard. Shards of other sizes may have the same names.

    Raises:
        ValueError: `out` holds something else, or a damaged plan.
    """
    wanted = {**asdict(plan), "parts": parts, "shard_size": shard_size}
    # Parts may start together: the second one waits, to find the folder claimed.
    lock, taken = out / "packing-claim.lock", f"--out {out}: another part is about to start"
    with locked(lock, taken, wait=True):
        content = [path for path in sorted(out.iterdir()) if not _is_passing(path)]
        state = _read_state(out / STATE, overwrite=overwrite)
        if state is not None:
            state.setdefault("shard_size", shard_size)  # which former versions did not keep
        if state == wanted and not (out / MANIFEST).exists():
            return
        if content and not overwrite:
            kind = "finished shards" if (out / MANIFEST).exists() else "other files"
            if state is not None:
                kind = "an unfinished pack of another source or other options"
                if {**state, "parts": parts} == wanted:
                    kind = f"an unfinished pack in {state.get('parts')} parts, not in {parts}"
            raise ValueError(f"--out {out} holds {kind}; choose another folder or give --overwrite")
        if foreign := [path.name for path in content if not _is_ours(path)]:
            raise ValueError(
                f"--out {out} holds {foreign[0]}, which no pack wrote; nothing was removed"
            )
        for path in sorted(content, key=lambda p: p.name != MANIFEST):  # the manifest first
            path.unlink()
        (out / CONTACT_SHEET).unlink(missing_ok=True)
        write_atomically(out / STATE, json.dumps(wanted, indent=1))


def _read_state(path: Path, *, overwrite: bool) -> dict[str, Any] | None:
    """What an unfinished pack keeps of itself; None where there is none, or it is overwritten."""
    try:
        return read_json(path, STATE_BYTES, {})
    except FileNotFoundError:
        return None
    except ValueError as error:
        if overwrite:
            return None
        raise ValueError(f"{error}; pack again with --overwrite") from error


def is_finished(out: Path, plan: Plan) -> bool:
    """Whether `out` holds the finished shards of just this plan."""
    try:
        found = read_json(out / MANIFEST, MANIFEST_BYTES, {})
    except (FileNotFoundError, ValueError):  # none, or a foreign one
        return False
    return bool(found.get("pack_sha256") == plan.sha256)


def remove_partials(out: Path) -> None:
    """Removes the half-written files of killed runs; only for who holds the whole folder's lock."""
    for path in [*out.glob("*.partial"), *out.glob("packing-*.lock")]:
        if _is_passing(path):
            path.unlink(missing_ok=True)


def _is_passing(path: Path) -> bool:
    """Whether a file may lie in any pack's folder: a lock, a half-written file, the overview."""
    is_partial = path.suffix == ".partial" and _is_ours(path)
    return is_partial or path.suffix == ".lock" or path.name == CONTACT_SHEET


def _is_ours(path: Path) -> bool:
    return path.is_file() and _OURS.fullmatch(path.name) is not None
