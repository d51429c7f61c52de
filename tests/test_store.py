"""MLflow's SQLite store, left half made: recognised, kept, made anew; never at a run's cost."""

import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from dan_dist.tracking import sqlite
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.faults import ClosedError
from dan_dist.tracking.store import check_new, connect
from dan_dist.tracking.tracker import MlflowTracker, RunRecord, check_recorded

RECORD = RunRecord(experiment="e", name="n", params={}, config={})


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "STILL_S", 0.2)


def change(path: Path, *commands: str) -> None:
    with closing(sqlite3.connect(path)) as store:
        store.execute("PRAGMA foreign_keys = OFF")
        for command in commands:
            store.execute(command)
        store.commit()


# What a death in between leaves: the first tables without a mark of their version, tables of a
# version that is not noted yet, a version noted before its last table.
HALF_MADE = [
    ("DROP TABLE alembic_version", "DROP TABLE logged_models", "DROP TABLE trace_info"),
    ("UPDATE alembic_version SET version_num = '451aebb31d03'",),
    ("DROP TABLE spans",),
]


@pytest.mark.parametrize("commands", HALF_MADE)
def test_a_store_half_made_is_made_anew(
    empty_store: Path, tmp_path: Path, commands: tuple[str, ...], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    change(path, *commands)
    before = path.read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    with MlflowTracker(tmp_path / "run", RECORD) as tracker:
        tracker.metrics({"a": 1.0}, 1)
        tracker.conclude("FINISHED")
    run = connect(f"sqlite:///{path}").get_run(tracker.run_id)
    assert run.data.metrics == {"a": 1.0} and run.info.status == "FINISHED"
    kept = tmp_path / "mlflow.db.half-made"
    if commands != HALF_MADE[2]:  # which MLflow itself completes
        assert len(kept.read_bytes()) == len(before)
        assert f"{path} was half made and held no run: made anew, kept as {kept}" in caplog.text


def test_a_store_with_runs_is_left_alone(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    change(path, "INSERT INTO runs (run_uuid, experiment_id) VALUES ('a', 0)", *HALF_MADE[1])
    before = path.read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    with pytest.raises(ValueError, match=r"holds runs .* completed by: mlflow db upgrade sqlite"):
        MlflowTracker(tmp_path / "run", RECORD)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.half-made*"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"adopted": "7" * 32}, "MLflow has no run 7777"),
        ({"experiment": "id:41"}, "MLflow has no experiment 41, which tracking.experiment or"),
    ],
)
def test_a_store_that_is_not_there_yet_holds_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], fault: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    with pytest.raises(ValueError, match=rf"{fault}.*its store sqlite:///.*/new\.db is not there"):
        MlflowTracker(tmp_path / "run", replace(RECORD, **changes))
    if "experiment" in changes:
        with pytest.raises(ValueError, match=fault):
            check_recorded(changes["experiment"])
        with pytest.raises(ClosedError, match=fault):
            check_new("sqlite:///new.db", changes["experiment"])
    check_recorded("id:0")  # which every store has
    check_recorded("a name")
    assert not (tmp_path / "new.db").exists()


def test_a_store_in_the_making_is_waited_for(empty_store: Path, tmp_path: Path) -> None:
    """A server that starts makes its tables at this moment."""
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    change(path, *HALF_MADE[0])

    def go_on() -> None:
        time.sleep(0.1)
        change(path, "CREATE TABLE one_more (a INTEGER)")

    thread = threading.Thread(target=go_on)
    thread.start()
    assert not sqlite.mend(f"sqlite:///{path}", OSError("table runs already exists"))
    thread.join()
    with closing(sqlite3.connect(path)) as store:
        assert store.execute("SELECT COUNT(*) FROM one_more").fetchone() == (0,)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:///a/b.db", Path("a/b.db")),
        ("sqlite+pysqlite:////a/b.db?timeout=9", Path("/a/b.db")),
        ("sqlite+pysqlcipher:///b.db", Path("b.db")),
        ("sqlite+pysqlite:///:memory:", None),
        ("sqlite+pysqlite://", None),
        ("sqlitex:///a.db", None),
        ("postgresql+psycopg2:///a.db", None),
    ],
)
def test_a_stores_file_is_known_by_each_spelling(uri: str, path: Path | None) -> None:
    assert sqlite.database(uri) == path


def test_a_full_disk_is_no_reason_to_begin_anew(empty_store: Path) -> None:
    uri = f"sqlite:///{empty_store}"
    for text in ("database or disk is full", "database is locked", "disk I/O error"):
        assert not sqlite.mend(uri, OSError(text))
    with pytest.raises(ClosedError, match=f"begins after: mv {empty_store}"):
        sqlite.mend(uri, OSError("Can't locate revision identified by 'abc'"))
    assert not sqlite.mend("http://h", OSError("table runs already exists"))


def test_a_store_on_a_disk_that_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is full while MLflow makes its tables, and has room again under the same training."""
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    path, limit = tmp_path / "mlflow.db", [40]  # pages
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.setattr(tracking, "RETRY_S", 60.0)

    def bound(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {limit[0]}")

    event.listen(Pool, "checkout", bound)
    try:
        with MlflowTracker(tmp_path / "run", RECORD) as tracker:
            while "disk is full" not in caplog.text:
                time.sleep(0.05)
            limit[0] = 100_000
            tracker.metrics({"a": 1.0}, 1)
            tracker.conclude("FINISHED")
    finally:
        event.remove(Pool, "checkout", bound)
    assert tracker.run_id is not None
    assert connect(f"sqlite:///{path}").get_run(tracker.run_id).data.metrics == {"a": 1.0}
