"""What reaches MLflow through the journal, whatever becomes of server, disk and process."""

import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from conftest import history, run, single
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.delivery import Delivery
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import read_records, read_sent
from dan_dist.tracking.tracker import RunRecord, record_failure

Write = Callable[[str], Path]
RUN = {"experiment": "e", "name": "n", "parent": None, "time_ms": 5, "params": {}, "config": {}}
RECORD = RunRecord(experiment="dan_dist", name="n", params={}, config={})


def test_a_journal_forgets_a_torn_line_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("run", uri="x", **RUN)
    journal.append("metrics", values={"a": 1.0}, step=1, time_ms=1)
    with pytest.raises(OSError, match="in use by another process"):
        Journal(tmp_path)
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metr')
    again = Journal(tmp_path)
    assert again.id == journal.id and again.opened and again.uri == "x"
    assert [r["kind"] for r in again.pending] == ["run", "metrics"]
    assert again.new_metrics({"a": 2.0, "b": 3.0}, 1) == {"b": 3.0}
    again.run_id = "r"
    again.settle("records")
    again.settle("artifacts")  # the run's configuration
    again.append("metrics", values={"a": 4.0}, step=2, time_ms=1)
    again.close()
    assert [r.get("step") for r in Journal(tmp_path).pending] == [1, 2]
    (tmp_path / "journal.jsonl").write_text("{}\nno json\n{}\n")
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 1, is damaged"):
        Journal(tmp_path)


@pytest.mark.slow
def test_a_server_that_was_away_gets_every_record_once(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    options = ["tracking.enabled=true", "train.max_steps=6"]
    assert single(tiny("run"), *options).status == "finished"
    assert caplog.text.count("failed, its journal grows") == 1
    assert f"python -m dan_dist.tracking replay {tmp_path / 'run'}" in caplog.text
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "dan_dist.tracking", "replay", str(tmp_path / "run")]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for expected in (True, False):  # a second time there is nothing left to send
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0 and ("0 records" not in done.stdout) == expected, done.stderr
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5, 6]
    assert found.info.status == "FINISHED"
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert artifacts >= {"config.yaml", "confusion_matrix.png"}
    (model,) = found.outputs.model_outputs
    assert client.get_logged_model(model.model_id).status == "READY"


@pytest.mark.slow
def test_recorded_metrics_do_not_depend_on_interruptions(tiny: Write, tmp_path: Path) -> None:
    options = ["tracking.enabled=true", "train.log_every=5", "train.max_steps=10"]
    single(tiny("whole"), *options)
    single(tiny("parts"), *options, "train.max_steps=3")
    single(tiny("parts"), *options, "train.max_steps=8", "train.checkpoint_every=4")
    single(tiny("parts"), *options)

    def recorded(name: str) -> list[Any]:
        records = [r for r in read_records(tmp_path / name) if r["kind"] == "metrics"]
        kept = [(r["step"], r["values"]) for r in records]
        return [(step, v["train/loss"], v["train/gradient_norm"]) for step, v in kept
                if "train/loss" in v]  # fmt: skip

    assert [step for step, *_ in recorded("whole")] == [5, 10]
    assert recorded("parts") == recorded("whole")


class FullDisk(FileIO):
    """Takes 9 bytes."""

    def write(self, data: Any) -> int:
        return super().write(data[:9])


def test_a_run_that_was_killed_before_it_began_begins_anew(tmp_path: Path) -> None:
    """Its journal holds no run that could have failed."""
    Journal(tmp_path).close()
    record_failure(tmp_path)
    again = Journal(tmp_path)
    assert not again.opened and not again.pending
    again.append("run", uri="x", **RUN)
    again.close()
    record_failure(tmp_path)
    assert [r["kind"] for r in Journal(tmp_path).pending] == ["run", "status"]


def test_a_rollback_takes_back_steps_and_no_samples(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("run", uri="x", **RUN)
    journal.append("metrics", values={"system/0/cpu": 1.0}, step=7, time_ms=1)
    journal.append("metrics", values={"a": 1.0}, step=7, time_ms=1)
    journal.append("rollback", step=5)
    assert journal.last_step == {"system/0/cpu": 7, "a": 5}
    journal.close()
    assert [r["values"] for r in read_records(tmp_path) if "values" in r] == [{"system/0/cpu": 1.0}]


def test_a_journal_waits_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.append("run", uri="x", **RUN)
    whole = journal._file
    journal._file = FullDisk(tmp_path / "journal.jsonl", "ab+")
    for step in (1, 2):
        journal.append("metrics", values={"a": 1.0}, step=step, time_ms=1)
    assert caplog.text.count("its records wait in memory") == 1
    assert [r["kind"] for r in journal.pending] == ["run"]  # nothing is sent before it is kept
    assert [r["kind"] for r in read_records(tmp_path)] == ["journal", "run"]
    journal._file = whole
    journal.append("rollback", step=1)
    assert journal.new_metrics({"a": 5.0}, 1) == {} and journal.new_metrics({"a": 5.0}, 2)
    journal.append("metrics", values={"a": 5.0}, step=2, time_ms=1)
    journal.close()
    found = [(r["step"], r["values"]["a"]) for r in read_records(tmp_path) if "values" in r]
    assert found == [(1, 1.0), (2, 5.0)]  # of step 2, what was computed anew


def test_journals_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They name files that are not theirs or gone, a server, what MLflow refuses; they are lost."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "secret").write_text("secret")
    journal = Journal(tmp_path / "run")
    journal.append(
        "run", experiment="dan_dist", name="n", parent=None, uri="http://127.0.0.1:9",
        artifacts=f"file:{tmp_path}/stolen", params={}, config={}, time_ms=5,
    )  # fmt: skip
    for path in ("../secret", "figures/gone.png"):
        journal.append("artifact", path=path, folder="")
    journal.append("metrics", values={"bad": 1.0}, step=1, time_ms=-6)
    journal.append("metrics", values={"train/loss": 1.0}, step=1, time_ms=6)
    journal.close()
    with pytest.raises(ValueError, match=r"begun in the store http://127\.0\.0\.1:9; to send it"):
        tracking.replay(tmp_path / "run")
    arrived, left_out = tracking.replay(tmp_path / "run", uri)
    assert arrived == 2 and [item.number for item in left_out] == [1, 2, 3]
    assert "../secret lies outside" in caplog.text and "gone.png is not there" in caplog.text
    assert caplog.text.count("left out of MLflow") == 3
    assert history(uri) == [(1, 1.0)] and not (tmp_path / "stolen").exists()
    assert not list((tmp_path / "mlruns").rglob("secret"))
    run_id = read_sent(tmp_path / "run")[1]
    (tmp_path / "run" / "journal.jsonl").unlink()
    with tracking.MlflowTracker(tmp_path / "run", RECORD, run_id=run_id) as tracker:
        tracker.metrics({"train/loss": 2.0}, 2)
        tracker.conclude("FINISHED")
    assert history(uri) == [(1, 1.0), (2, 2.0)]
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_a_run_is_found_again_when_the_answer_to_its_creation_was_lost(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    journal = Journal(tmp_path / "run")
    journal.append("run", experiment="e", name="n", parent=None, artifacts=None, uri=uri,
                   params={}, config={}, time_ms=5)  # fmt: skip
    Delivery(journal, uri).deliver(journal.pending[0])
    created = journal.run_id
    journal.run_id = None  # as after a crash before it was noted
    Delivery(journal, uri).deliver(journal.pending[0])
    assert journal.run_id == created


def test_a_server_that_hangs_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and never answers."""
    import socket

    monkeypatch.setattr(tracking, "SHORT_DRAIN_S", 0.5)
    monkeypatch.setattr(tracking, "CHECK_S", 1.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with tracking.MlflowTracker(tmp_path / "run", RECORD) as tracker:
            began = time.monotonic()
            for step in range(50):
                tracker.metrics({"train/loss": 1.0}, step)
            assert time.monotonic() - began < 1.0
            tracker.conclude("KILLED")
        assert time.monotonic() - began < 3.0
    assert len(Journal(tmp_path / "run").pending) == 53
