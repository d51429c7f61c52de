"""A dry run's look at MLflow's store: it reads a file alone, and finds what a training would."""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from test_store import change

from dan_dist import dry_run
from dan_dist.config import load_config
from dan_dist.record import known_run
from dan_dist.tracking import sqlite
from dan_dist.tracking.faults import ClosedError
from dan_dist.tracking.store import check_takes, connect

Write = Callable[[str], Path]
DELETED = "UPDATE experiments SET name = 'mine', lifecycle_stage = 'deleted'"
RUN = """INSERT INTO runs (run_uuid, experiment_id, lifecycle_stage, user_id, status, artifact_uri,
         start_time, end_time) VALUES ('r9', 0, 'active', 'u', 'FINISHED', 'a', 1, 2)"""
OLD, NEWER = (f"UPDATE alembic_version SET version_num = '{version}'"
              for version in ("451aebb31d03", "of tomorrow"))  # fmt: skip
# What was done to an empty store; the experiment and the run asked for; what stops the training
STORES: dict[str, tuple[list[str], str, str | None, str]] = {
    "takes a new experiment": ([], "mine", None, ""),
    "takes a run that is there": ([RUN], "Default", "r9", ""),
    "deleted experiment": ([DELETED], "mine", None, "'mine' was deleted; restore it: .* -x 0,"),
    "deleted, by its number": ([DELETED], "id:0", None, "'mine' was deleted"),
    "no such number": ([], "id:31", None, "MLflow has no experiment 31, which"),
    "no such run": ([], "mine", "r9", "MLflow has no run r9"),
    "deleted run": (
        [RUN.replace("active", "deleted")],
        "Default",
        "r9",
        "run r9 was deleted; rest",
    ),
    "run of a deleted experiment": ([DELETED, RUN], "other", "r9", "'mine' was deleted"),
    "another MLflow's, with a run": (
        [RUN, OLD],
        "mine",
        None,
        "holds runs or .* db upgrade sqlite",
    ),
    "a newer one's, with a run": ([RUN, NEWER], "mine", None, "holds runs or .* begins after: mv"),
    "a newer one's, empty": ([NEWER], "mine", None, ""),
    "without a version": ([RUN, "DROP TABLE alembic_version"], "mine", None, "version None, those"),
}


@pytest.mark.parametrize("case", STORES)
def test_a_store_that_is_there_is_judged_as_the_training_judges_it(
    case: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read alone; the training then opens it, and agrees."""
    commands, experiment, run_id, message = STORES[case]
    path = tmp_path / "mlflow.db"
    change(path, *commands)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        dry_run.check_store(store, experiment, run_id)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    monkeypatch.setattr(sqlite, "STILL_S", 0.0)
    message = message.replace("version None, those", "holds runs")
    with pytest.raises(ClosedError, match=message) if message else nullcontext():
        check_takes(connect(store), experiment, run_id)


def test_an_older_mlflow_s_store_is_brought_up(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where tables are missing, MLflow itself does so."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "mlflow.db"
    change(path, RUN, OLD, "DROP TABLE spans")
    dry_run.check_store(store, "mine", None)
    assert f"the training brings the tables of {path} to this MLflow's version" in caplog.text


def test_the_run_that_a_training_goes_on_with_is_looked_for(
    tiny: Write, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's, else one that was made for it, where no checkpoint names another."""
    options = ["tracking.enabled=true", "tracking.system_metrics=true"]
    config = load_config(tiny("run"), options)
    monkeypatch.setenv("MLFLOW_RUN_ID", "theirs")
    with pytest.raises(ValueError, match="MLflow has no run theirs"):
        dry_run.check(config, 1)
    assert known_run(config, "saved") is None
    assert known_run(load_config(tiny("run"), [*options, "tracking.parent=grid"]), None) is None
    (tmp_path / "run").mkdir()
    journal = tmp_path / "run" / "journal.jsonl"
    begun = {"kind": "run", "experiment": "e", "name": "n", "uri": store, "time_ms": 1,
             "params": {}, "config": {}, "adopted": "former"}  # fmt: skip
    records = {"kind": "journal", "id": "j"}, begun
    journal.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert known_run(config, None) == known_run(config, "saved") == "former"
    sent = {"settled": {"records": 1, "artifacts": 1, "models": 0}, "run_id": "own"}
    journal.with_suffix(".sent").write_text(json.dumps(sent))
    with pytest.raises(ValueError, match="MLflow has no run own"):
        dry_run.check(config, 1)
    journal.with_suffix(".sent").write_text(
        json.dumps({"settled": dict.fromkeys(sent["settled"], 0), "run_id": None})
    )
    journal.write_text("")
    monkeypatch.delenv("MLFLOW_RUN_ID")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "-2")
    with pytest.raises(ValueError, match="SAMPLING_INTERVAL is '-2' in the environment, expected"):
        dry_run.check(config, 1)
