"""The files of a run's journal, as whoever reads them sees them, while it may be written.

See `journal`: a line is a record, in one or several lanes; another file says what became of them.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dan_dist.tracking.forms import check_each, parse_record
from shards.files import check_form, parse_json, read_bounded

log = logging.getLogger(__name__)

NAME, SENT = "journal.jsonl", "journal.sent"
MOST_BYTES = 2**32  # of the one, and of the other
JOURNAL_TAG = "dan_dist.journal"  # of MLflow's run: its journal's id
SYSTEM = "system/"  # begins the names of a node's load, whose steps are samples

Record = dict[str, Any]
Lane = Literal["records", "artifacts", "models"]
LANES: tuple[Lane, ...] = ("records", "artifacts", "models")
_BEGINNING = {1: "journal", 2: "run"}  # line → its record
_SENT = {"run_id": str | None, "experiment_id": str | None, "settled": dict | None,
         "left_out": list | None}  # fmt: skip
# A run's configuration is an artifact of it; all else of the run is a record.
_LANES_OF: dict[str, tuple[Lane, ...]] = {
    "run": ("records", "artifacts"), "config": ("records", "artifacts"), "artifact": ("artifacts",),
    "model": ("models",),
}  # fmt: skip


def lanes_of(record: Mapping[str, Any]) -> tuple[Lane, ...]:
    """The lanes by which a record is sent."""
    return _LANES_OF.get(record["kind"], ("records",))


class LeftOut(NamedTuple):
    """A record, or a part of one, that MLflow refuses."""

    number: int  # of the record in its journal
    lane: Lane
    what: str
    reason: str


class Sent(NamedTuple):
    """What became of a journal's records."""

    settled: dict[Lane, int]  # how many of each lane were delivered or left out
    run_id: str | None  # MLflow's
    left_out: list[LeftOut]
    experiment_id: str | None = None  # MLflow's, of the run


def read_records(folder: Path) -> list[Record]:
    """The records of a run's journal, in order, while it may be written; none without a journal.

    Metrics of steps that were taken back, and computed again without damage, are left out.

    Raises:
        ValueError: a line but the last is no record.
    """
    records: list[Record] = []
    for record in parse(folder / NAME)[0] if (folder / NAME).is_file() else ():
        if record["kind"] == "rollback":
            last = record["step"]
            records = [r for r in records if not _is_after(r, last)]
        records.append(record)
    return records


def _is_after(record: Record, step: int) -> bool:
    """Whether a record holds metrics of a later step; a node's load counts samples, not steps."""
    if record["kind"] != "metrics" or record["step"] <= step:
        return False
    return not any(key.startswith(SYSTEM) for key in record["values"])


def read_sent(folder: Path) -> Sent:
    """What became of the records of a folder's journal; nothing before any was sent.

    Of a damaged file nothing counts: all is sent again, which does no harm, see `Delivery`.
    """
    path = folder / SENT
    if not path.is_file():
        return Sent({}, None, [])
    try:
        return _sent(folder, parse_json(read_bounded(path, MOST_BYTES), _SENT))
    except ValueError as error:
        log.warning(
            "%s is damaged: %s; all its records count as not sent, and MLflow keeps each once",
            path, error,
        )  # fmt: skip
        return Sent({}, None, [])


def _sent(folder: Path, content: Mapping[str, Any]) -> Sent:
    """What a file of that content says; ValueError: it is damaged."""
    items = content.get("left_out") or []
    check_each("left_out", items, {"number": int, "lane": str, "what": str, "reason": str})
    left_out = [LeftOut(*(item[key] for key in LeftOut._fields)) for item in items]
    settled = content.get("settled")
    if settled is None:  # as it was when a journal had one lane
        check_form(content, {"delivered": int})
        records = parse(folder / NAME)[0][1:] if (folder / NAME).is_file() else []
        done = [lane for record in records[: content["delivered"]] for lane in lanes_of(record)]
        settled = {lane: done.count(lane) for lane in LANES}
    check_form(settled, dict.fromkeys(LANES, int))
    if any(settled.values()) and content["run_id"] is None:
        raise ValueError("run_id is null, expected that of the records that were sent")
    return Sent(settled, content["run_id"], left_out, content.get("experiment_id"))


def read_id(folder: Path) -> str | None:
    """The id of a folder's journal, which MLflow's run has as a tag; None without a journal."""
    path = folder / NAME
    if not path.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError, OSError), path.open("rb") as file:
        return str(json.loads(file.readline())["id"])
    return None


def is_pending(folder: Path, own: str | None, uri: str) -> bool:
    """Whether the journal `own`, if `folder` holds it, has its run or a model still to send.

    uri: of the store to which it would be sent, without secrets.
    """
    if own is None or read_id(folder) != own:
        return False
    try:
        records, sent = read_records(folder), read_sent(folder)
    except (ValueError, OSError):  # damaged: nothing of it can be sent
        return False
    begun = [record["uri"] for record in records if record["kind"] == "run"]
    models = sum(record["kind"] == "model" for record in records)
    return begun[:1] == [uri] and (sent.run_id is None or sent.settled.get("models", 0) < models)


def remove_journal(folder: Path) -> None:
    """Removes the journal of a folder, so that a new run begins in it."""
    for name in (NAME, SENT):
        (folder / name).unlink(missing_ok=True)


def parse(path: Path) -> tuple[list[Record], int]:
    """The records of all whole lines, and the bytes that these take."""
    content = read_bounded(path, MOST_BYTES)
    whole, records = content.rfind(b"\n") + 1, list[Record]()
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            records.append(parse_record(line))
            if (kind := records[-1]["kind"]) != _BEGINNING.get(number, kind) or (
                number > 2 and kind in _BEGINNING.values()
            ):
                raise ValueError(f"kind is '{kind}', expected 'journal', 'run', then others")
        except ValueError as error:
            way_out = "without that file, the training goes on with a new one"
            raise ValueError(f"{path}, line {number}, is damaged: {error}; {way_out}") from error
    return records, whole
