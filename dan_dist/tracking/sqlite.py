"""MLflow's SQLite store: opened by one process at a time, and mended where it was left half made.

MLflow makes its tables one by one. A full disk or a kill in between leaves a file that it can
neither use nor complete: `table … already exists`, for ever.
"""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from dan_dist.tracking.faults import ClosedError
from shards.files import locked

log = logging.getLogger(__name__)

STILL_S = 5.0  # for which nobody changes a table of what is half made, and not in the making
_HALF_MADE = (
    "already exists", "duplicate column", "no such table", "no such column",
    "out-of-date database schema",
)  # fmt: skip
_BROKEN = ("not a database", "malformed", "Can't locate revision")  # the last: by a newer MLflow


def database(uri: str) -> Path | None:
    """The file of a SQLite store; None for another store."""
    if not uri.startswith("sqlite:") or "///" not in uri:
        return None
    name = uri.split("///", 1)[1].split("?", 1)[0]
    return Path(name) if name and name != ":memory:" else None


@contextmanager
def opening(uri: str) -> Iterator[None]:
    """Two processes that open a new SQLite store at once would both make its tables, torn."""
    path = database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{path}.lock"), f"another process opens {uri}", wait=True):
        yield


def mend(uri: str, error: Exception) -> bool:
    """Whether a store that could not be opened is empty now, as it was half made and held no run.

    What there was of it is kept beside it.

    Raises:
        ClosedError: this cannot be mended without loss; names the way on.
    """
    path = database(uri)
    if path is None or not path.is_file():
        return False
    refuse_broken(path, error)
    text = str(error)
    if not any(words in text for words in _HALF_MADE):
        return False
    with closing(sqlite3.connect(path)) as store:
        refuse_used(store, path, uri, text.splitlines()[0])
        before = _version(store)
        time.sleep(STILL_S)
        if _version(store) != before:
            return False  # a server that starts is making its tables
        aside = _keep(store, path)
        # In place, by SQLite's own means: who has the file open goes on in the same file.
        with closing(sqlite3.connect(":memory:")) as nothing:
            nothing.backup(store)
    log.warning("%s was half made and held no run: made anew, kept as %s", path, aside)
    return True


def refuse_used(store: sqlite3.Connection, path: Path, uri: str, reason: str) -> None:
    """Names the way on where a store whose tables are not this MLflow's holds what may be wanted.

    Raises:
        ClosedError: it holds runs, or experiments beside the first.
    """
    if _count(store, "runs") or _count(store, "experiments") > 1:
        raise ClosedError(
            f"{path} is half made or of another MLflow, and holds runs or experiments: {reason}; "
            f"it is completed by: mlflow db upgrade {uri}; a new one begins after: "
            f"mv {path} {path}.aside"
        )


def refuse_broken(path: Path, error: Exception) -> None:
    """Names the way on where a store is none, or a newer MLflow's.

    Raises:
        ClosedError: it is one of these.
    """
    text = str(error)
    if any(words in text for words in _BROKEN):
        raise ClosedError(
            f"{path} cannot be opened: {text.splitlines()[0]}; a new one begins after: "
            f"mv {path} {path}.aside"
        )


def _count(store: sqlite3.Connection, table: str) -> int:
    """The rows of a table; 0 where there is none."""
    found = store.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    return int(store.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]) if found else 0


def _version(store: sqlite3.Connection) -> int:
    """A number that grows with each change of the tables themselves."""
    return int(store.execute("PRAGMA schema_version").fetchone()[0])


def _keep(store: sqlite3.Connection, path: Path) -> Path:
    """Copies a store beside it; the first one is enough, as each further is as empty."""
    aside = path.with_name(f"{path.name}.half-made")
    if aside.exists():
        return aside
    try:
        with closing(sqlite3.connect(aside)) as copy:
            store.backup(copy)
    except sqlite3.Error:
        aside.unlink(missing_ok=True)
        raise
    return aside
