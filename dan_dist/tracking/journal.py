"""A run's records for MLflow, on disk first: each arrives once.

`journal.jsonl` holds a record a line, appended and flushed to the disk before anything is sent. A
record belongs to a lane, in which the order is kept; one lane does not wait for the next, so that
metrics arrive where artifacts cannot be stored. `journal.sent` holds how far each lane is, to which
run, and what was left out as MLflow refuses it. A process that is killed in the middle of a line
loses that line, which its successor computes again. Records that a full disk does not take wait in
memory until it does.
"""

import errno
import json
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from dan_dist.redaction import redact_tree
from dan_dist.tracking.journal_files import (
    LANES,
    NAME,
    SENT,
    SYSTEM,
    Lane,
    LeftOut,
    Record,
    Sent,
    lanes_of,
    parse,
    read_sent,
)
from shards.files import locked, write_atomically

log = logging.getLogger(__name__)


class Configured(NamedTuple):
    """A run's configuration, which may have changed when the run went on."""

    config: dict[str, Any]
    params: dict[str, str]
    changed: dict[str, str]  # parameters that did: all their values, and since which step


class Journal:
    """The records of one run, in order; written by one process at a time.

    Raises:
        BlockingIOError: another process has it open. OSError: it cannot be opened.
        ValueError: a line but the last is no record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(locked(folder / NAME, f"{folder} is in use by another process"))
        self._file: FileIO = (folder / NAME).open("ab+", buffering=0)
        self.changed, self._saving = threading.Condition(), threading.Lock()
        self._writing = threading.RLock()  # records come from the run, and from who samples
        self.last_step: dict[str, int] = {}  # metric → the last step it was noted for
        self._records: dict[int, Record] = {}  # by number: those that wait or were left out
        self._count = 0
        self._configurations: list[Record] = []  # the run as it was begun, and each change
        self.inputs: Record = {}  # the last record of what the run is computed on
        self._lanes: dict[Lane, deque[int]] = {lane: deque() for lane in LANES}
        self.unwritten: list[Record] = []
        self._full = False
        records = self._read()
        if not records:
            records = [{"kind": "journal", "id": uuid.uuid4().hex}]
            self.unwritten += records
        self.id: str = records[0]["id"]
        for record in records[1:]:
            self._add(record)
        self.opened = self.begun is not None
        self.uri: str = self.begun["uri"] if self.begun else ""  # without secrets
        settled, self.run_id, left_out, self.experiment_id = read_sent(folder)
        self.left_out = [item for item in left_out if item.number in self._records]
        self._settled: dict[Lane, int] = dict.fromkeys(LANES, 0)
        for lane in LANES:
            waiting = len(self._lanes[lane])
            for _ in range(min(settled.get(lane, 0), waiting)):  # the journal may be a shorter one
                self._pass(lane)

    @property
    def begun(self) -> Record | None:
        """The record of the run's beginning."""
        return self._configurations[0] if self._configurations else None

    def configured(self) -> "Configured | None":
        """The configuration as the journal has it; None before a run was begun."""
        if self.begun is None:
            return None
        first: dict[str, str] = self.begun["params"]
        values, history = dict(first), dict(first)
        for record in self._configurations[1:]:
            for key, value in record["changed"].items():
                before = history.get(key, "unknown")
                history[key] = f"{before}; from step {record['step']}: {value}"
            values |= record["changed"]
        changed = {key: text for key, text in history.items() if text != first.get(key)}
        return Configured(self._configurations[-1]["config"], values, changed)

    @property
    def pending(self) -> list[Record]:
        """The records that were not settled in each of their lanes, in order."""
        with self.changed:
            return [self._records[n] for n in self.pending_numbers()]

    def pending_numbers(self, *lanes: Lane) -> list[int]:
        """The numbers of the records that wait in `lanes`, or in any."""
        return sorted({n for lane in lanes or LANES for n in self._lanes[lane]})

    def first(self, lane: Lane) -> tuple[int, Record] | None:
        """The first record that waits in a lane, and its number; None while it has to wait.

        An artifact or a model waits for the records before it: a model's metrics are among them.
        """
        with self.changed:
            records, own = self._lanes["records"], self._lanes[lane]
            if not own or (lane != "records" and records and records[0] <= own[0]):
                return None
            return own[0], self._records[own[0]]

    def append(self, kind: str, **content: Any) -> None:
        """Writes a record, without secrets, to the disk and hands it to whoever sends them."""
        with self._writing:
            self.append_later(kind, **content)
            self.write()

    def append_later(self, kind: str, **content: Any) -> None:
        """Keeps a record until the next one is written: its writer does not wait for the disk."""
        with self._writing:
            self.unwritten.append(redact_tree({"kind": kind, **content}))

    def write(self) -> None:
        """Writes what is not on the disk yet, or nothing of it."""
        size_bytes = os.fstat(self._file.fileno()).st_size
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in self.unwritten)
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size_bytes)
            if not self._full:
                log.warning(
                    "%s: %s; its records wait in memory", self.folder / NAME, error.strerror
                )
            self._full = True
            return
        with self.changed:
            for record in self.unwritten:
                if record["kind"] != "journal":
                    self._add(record)
            self.unwritten, self._full = [], False
            self.changed.notify_all()

    def new_metrics(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Those of `values` that were not noted yet: a resumed run computes some steps again."""
        return {key: v for key, v in values.items() if step > self.last_step.get(key, -1)}

    def settle(self, lane: Lane, *left_out: LeftOut) -> None:
        """The first record of a lane was delivered, but for what is left out of it."""
        with self.changed:
            self.left_out += left_out
            self._pass(lane)
            self.changed.notify_all()
        with suppress(OSError):  # what is sent a second time does no harm
            self.save_sent()

    def retry(self, number: int, lane: Lane, *left_out: LeftOut) -> None:
        """A record that was left out was sent again, but for what is still left out of it."""
        with self.changed:
            others = [item for item in self.left_out if (item.number, item.lane) != (number, lane)]
            self.left_out = sorted([*others, *left_out])
        self.save_sent()

    def record(self, number: int) -> Record:
        """A record that waits or was left out."""
        return self._records[number]

    def save_sent(self) -> None:
        """Writes to the disk what became of the records.

        Raises:
            OSError: it cannot be written.
        """
        with self._saving:  # lanes are settled by threads of their own
            with self.changed:
                left_out = list(self.left_out)
                sent = Sent(dict(self._settled), self.run_id, left_out, self.experiment_id)
            content = {**sent._asdict(), "left_out": [item._asdict() for item in sent.left_out]}
            write_atomically(self.folder / SENT, json.dumps(content))

    def close(self) -> None:
        """Lets another process have the journal."""
        self._file.close()
        self._lock.close()

    def _add(self, record: Record) -> None:
        for lane in lanes_of(record):
            self._lanes[lane].append(self._count)
        self._records[self._count] = record
        self._count += 1
        if record["kind"] in ("run", "config"):
            self._configurations.append(record)
        if record["kind"] == "inputs":
            self.inputs = {key: record[key] for key in ("datasets", "model")}
        if record["kind"] == "metrics":
            for key in record["values"]:
                self.last_step[key] = max(record["step"], self.last_step.get(key, -1))
        if record["kind"] == "rollback":
            self.last_step = {
                k: s if k.startswith(SYSTEM) else min(s, record["step"])
                for k, s in self.last_step.items()
            }

    def _pass(self, lane: Lane) -> None:
        """Takes the first record out of a lane, and out of memory where nobody needs it."""
        number = self._lanes[lane].popleft()
        self._settled[lane] += 1
        waits = any(own and own[0] <= number and number in own for own in self._lanes.values())
        if not waits and all(number != item.number for item in self.left_out):
            del self._records[number]

    def _read(self) -> list[Record]:
        """All whole lines; what a killed process left of another is cut off."""
        records, whole = parse(self.folder / NAME)
        self._file.truncate(whole)
        return records
