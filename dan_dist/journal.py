"""What a run has to tell MLflow, on disk first: nothing is lost, nothing is told twice.

`journal.jsonl` holds a record a line, appended and flushed to the disk before anything is sent;
`journal.sent` holds how many were delivered and to which run. A process that is killed in the
middle of a line loses that line, which its successor computes again.
"""

import fcntl
import json
import os
import threading
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

NAME, SENT = "journal.jsonl", "journal.sent"


class Journal:
    """The records of one run, in order; written by one process at a time.

    Raises:
        BlockingIOError: another process has it open. OSError: it cannot be written.
        ValueError: it is damaged before its last line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / NAME).open("ab+")
        self._lock()
        self.changed = threading.Condition()
        self.delivered, self.run_id = read_sent(folder)
        self.last_step: dict[str, int] = {}  # metric → the last step it was noted for
        self.pending: deque[dict[str, Any]] = deque()
        records = self._read()
        if not records:
            records = [{"kind": "journal", "id": uuid.uuid4().hex}]
            self._write(records[0])
        self.id: str = records[0]["id"]
        for record in records[1:]:
            self._note(record)
        self.opened = len(records) > 1  # a run was begun in it
        self.uri: str = next((r["uri"] for r in records if r["kind"] == "run"), "")
        for _ in range(self.delivered):
            self.pending.popleft()

    def append(self, kind: str, **content: Any) -> None:
        """Writes a record to the disk and hands it to whoever sends them."""
        record = {"kind": kind, **content}
        self._write(record)
        with self.changed:
            self._note(record)
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
        self.save_sent()

    def save_sent(self) -> None:
        """Writes what was delivered to the disk."""
        partial = self.folder / f"{SENT}.partial"
        with partial.open("w") as file:
            json.dump({"delivered": self.delivered, "run_id": self.run_id}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / SENT)

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{self.folder} is in use by another process") from error
        except OSError:
            pass  # this file system has no locks

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _note(self, record: dict[str, Any]) -> None:
        self.pending.append(record)
        if record["kind"] == "metrics":
            for key in record["values"]:
                self.last_step[key] = max(record["step"], self.last_step.get(key, -1))

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; what a killed process left of another is cut off."""
        records, whole = _parse(self.folder / NAME)
        self._file.truncate(whole)
        return records


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's journal, in order, while it may be written; none without a journal.

    Raises:
        ValueError: it is damaged before its last line.
    """
    return _parse(folder / NAME)[0] if (folder / NAME).is_file() else []


def read_sent(folder: Path) -> tuple[int, str | None]:
    """How many records of a journal were delivered, and to which run; 0 and None before that."""
    path = folder / SENT
    if not path.is_file():
        return 0, None
    content = json.loads(path.read_text())
    return int(content["delivered"]), content["run_id"]


def forget(folder: Path) -> None:
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
