"""A run's records for MLflow, on disk first: none is lost, none is sent twice.

`journal.jsonl` holds a record a line, appended and flushed to the disk before anything is sent;
`journal.sent` holds how many were delivered and to which run. A process that is killed in the
middle of a line loses that line, which its successor computes again. Records that a full disk does
not take wait in memory until it does.
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
from typing import Any

from shards.files import locked, write_atomically

log = logging.getLogger(__name__)

NAME, SENT = "journal.jsonl", "journal.sent"


class Journal:
    """The records of one run, in order; written by one process at a time.

    Raises:
        BlockingIOError: another process has it open. OSError: it cannot be opened.
        ValueError: it is damaged before its last line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(locked(folder / NAME, f"{folder} is in use by another process"))
        self._file: FileIO = (folder / NAME).open("ab+", buffering=0)
        self.changed = threading.Condition()
        self.delivered, self.run_id = read_sent(folder)
        self.last_step: dict[str, int] = {}  # metric → the last step it was noted for
        self.pending: deque[dict[str, Any]] = deque()
        self.unwritten: list[dict[str, Any]] = []
        self._full = False
        records = self._read()
        if not records:
            records = [{"kind": "journal", "id": uuid.uuid4().hex}]
            self.unwritten += records
        self.id: str = records[0]["id"]
        for record in records[1:]:
            self._add(record)
        self.opened = len(records) > 1  # a run was begun in it
        self.uri: str = next((r["uri"] for r in records if r["kind"] == "run"), "")
        self.delivered = min(self.delivered, len(self.pending))  # where the journal was removed
        for _ in range(self.delivered):
            self.pending.popleft()

    def append(self, kind: str, **content: Any) -> None:
        """Writes a record to the disk and hands it to whoever sends them."""
        self.unwritten.append({"kind": kind, **content})
        self.write()

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

    def acknowledge(self) -> None:
        """The first pending record was delivered."""
        with self.changed:
            self.pending.popleft()
            self.delivered += 1
            self.changed.notify_all()
        with suppress(OSError):  # what is sent a second time does no harm
            self.save_sent()

    def save_sent(self) -> None:
        """Writes to the disk how many records were delivered.

        Raises:
            OSError: it cannot be written.
        """
        content = {"delivered": self.delivered, "run_id": self.run_id}
        write_atomically(self.folder / SENT, json.dumps(content))

    def close(self) -> None:
        """Lets another process have the journal."""
        self._file.close()
        self._lock.close()

    def _add(self, record: dict[str, Any]) -> None:
        self.pending.append(record)
        if record["kind"] == "metrics":
            for key in record["values"]:
                self.last_step[key] = max(record["step"], self.last_step.get(key, -1))
        if record["kind"] == "rollback":
            self.last_step = {k: min(s, record["step"]) for k, s in self.last_step.items()}

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; what a killed process left of another is cut off."""
        records, whole = _parse(self.folder / NAME)
        self._file.truncate(whole)
        return records


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's journal, in order, while it may be written; none without a journal.

    Metrics of steps that were taken back, and computed again without damage, are left out.

    Raises:
        ValueError: it is damaged before its last line.
    """
    records: list[dict[str, Any]] = []
    for record in _parse(folder / NAME)[0] if (folder / NAME).is_file() else ():
        if record["kind"] == "rollback":
            last = record["step"]
            records = [r for r in records if r["kind"] != "metrics" or r["step"] <= last]
        records.append(record)
    return records


def read_sent(folder: Path) -> tuple[int, str | None]:
    """How many records of a journal were delivered, and to which run; 0 and None before that."""
    path = folder / SENT
    if not path.is_file():
        return 0, None
    content = json.loads(path.read_text())
    return int(content["delivered"]), content["run_id"]


def remove_journal(folder: Path) -> None:
    """Removes the journal of a folder, so that a new run begins in it."""
    for name in (NAME, SENT):
        (folder / name).unlink(missing_ok=True)


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of all whole lines, and the bytes that these take."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in content[:whole].splitlines()], whole
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
