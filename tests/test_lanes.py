"""What MLflow refuses, lacks or cannot store keeps nothing else from it, and is named."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from tracking_server import TrackingServer

from conftest import single
from dan_dist.config import load_config
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.__main__ import main as command
from dan_dist.tracking.faults import is_refusal, reason_of
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import NAME, SENT, read_sent
from dan_dist.tracking.names import MOST_LETTERS, ORIGINAL, fit, is_fit
from dan_dist.tracking.tracker import MlflowTracker, RunRecord, replay

Write = Callable[[str], Path]
GONE = (404, "<html>no such page</html>")


def client() -> Any:
    import mlflow

    return mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def record(**changes: Any) -> RunRecord:
    values = {"experiment": "lanes", "name": "n", "params": {"lr": 0.1}, "config": {"a": 1}}
    return RunRecord(**{**values, **changes})


def track(folder: Path, values: dict[str, float], **changes: Any) -> Any:
    """Records a run with an artifact, and metrics of two steps; returns MLflow's run."""
    folder.mkdir(exist_ok=True)
    (folder / "figure.png").write_bytes(b"x")
    with MlflowTracker(folder, record(**changes)) as tracker:
        tracker.artifact(folder / "figure.png", "")
        tracker.metrics(values, 1)
        tracker.metrics(values, 2)
        tracker.conclude("FINISHED")
    return client().get_run(tracker.run_id)


NAMES = [
    "val/recall/happy [1]", "a/b", "../x", "a//b", "/", "", "..", "x\n", "é ü", "😀", "a" * 300,
    "val/f1/ x ", "...x", "a/.", "50 %", "=1+1", "a\0b", "\ud800",
]  # fmt: skip


def test_names_are_made_fit_and_stay_different() -> None:
    from mlflow.utils.validation import _validate_metric_name

    made = [fit(name) for name in NAMES]
    assert len(set(made)) == len(NAMES) and made[1] == "a/b" and made[8] == "é ü"
    for name in made:
        assert is_fit(name) and fit(name) == name and len(ORIGINAL + name) <= MOST_LETTERS
        _validate_metric_name(ORIGINAL + name)
        _validate_metric_name(name)
    assert fit("happy [1]") != fit("happy (1)") != fit("happy _1_")


def test_odd_class_names_lose_nothing(
    tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"val/accuracy": 0.5, "val/recall/sad 😢": 0.1, "val/recall/a/b": 0.2, "val/f1/%": 0.3}
    params = {"classes: ü|%": "é\0\ud800", "long": "1" * 6001, "short": "1" * 6000}
    run = track(tmp_path / "run", values, params=params, name="n" * 251)
    assert run.data.params["long"] == params["short"] and run.info.run_name == "n" * 250
    for what in ("parameter classes: ü|%", "parameter long", "name of the run"):
        assert caplog.text.count(f"{what}: cut to the ") == 1
    assert caplog.text.count("cut to the") == 3 and "NUL; whole in config.yaml" in caplog.text
    assert run.data.metrics == {fit(name): value for name, value in values.items()}
    kept = {k.removeprefix(ORIGINAL): v for k, v in run.data.tags.items() if ORIGINAL in k}
    odd = ["val/recall/sad 😢", "val/f1/%", "classes: ü|%"]
    assert kept == {fit(name): name for name in odd}
    assert not read_sent(tmp_path / "run").left_out


def test_metrics_do_not_wait_for_artifacts(
    tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults["mlflow-artifacts"] = (507, "no room")
    run = track(tmp_path / "run", {"val/accuracy": 0.5})
    assert run.info.status == "FINISHED" and run.data.metrics == {"val/accuracy": 0.5}
    assert run.data.params == {"lr": "0.1"}
    assert caplog.text.count("does not take the run's artifacts, which wait") == 1
    assert "2 records have not reached MLflow (artifacts); when it is back" in caplog.text
    assert [r["kind"] for r in Journal(tmp_path / "run").pending] == ["run", "artifact"]
    server.faults.clear()
    assert replay(tmp_path / "run") == (2, [])
    paths = {a.path for a in client().list_artifacts(run.info.run_id)}
    assert paths == {"config.yaml", "figure.png"}


@pytest.mark.slow
def test_a_server_that_lacks_an_endpoint_gets_the_rest(
    tiny: Write, tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.faults["logged-models"] = GONE
    options = ["tracking.enabled=true", "train.max_steps=3"]
    single(tiny("run"), *options)
    assert caplog.text.count("left out of MLflow: model best.pt: ") == 1
    assert "left out of MLflow, which refused it, in all: 1; to see it" in caplog.text
    (left_out,) = read_sent(tmp_path / "run").left_out
    assert left_out.lane == "models" and "404" in left_out.reason
    single(tiny("run"), "tracking.enabled=true", "train.max_steps=6")
    run = client().get_run(read_sent(tmp_path / "run").run_id)
    history = client().get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    assert command(["replay", str(tmp_path / "run")]) == 1  # as often as one likes: it is not sent
    assert capsys.readouterr().out.startswith("0 records sent\nleft out: model best.pt: ")
    server.faults.clear()
    assert command(["replay", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == "2 records sent\n"
    assert len(client().get_run(run.info.run_id).outputs.model_outputs) == 1


def test_of_a_record_that_is_partly_refused_the_rest_arrives(
    tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"})
    server.faults["log-batch"] = lambda body: (400, refusal) if b'"bad' in body else None
    run = track(tmp_path / "run", {"bad": 1.0, "good": 2.0}, params={"bad p": 1, "p": 2})
    assert run.data.metrics == {"good": 2.0} and run.data.params == {"p": "2"}
    assert caplog.text.count("left out of MLflow: metric bad: ") == 1  # of the first step
    assert caplog.text.count("left out of MLflow: parameter bad p: ") == 1
    found = [(item.number, item.what) for item in read_sent(tmp_path / "run").left_out]
    assert found == [(0, "parameter bad p"), (3, "metric bad"), (4, "metric bad")]
    server.faults.clear()
    assert replay(tmp_path / "run") == (3, [])
    assert client().get_run(run.info.run_id).data.metrics == {"good": 2.0, "bad": 1.0}


def test_a_refused_original_of_a_name_holds_no_value_back(
    tmp_path: Path, server: TrackingServer
) -> None:
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"})
    server.faults["log-batch"] = lambda body: (400, refusal) if ORIGINAL.encode() in body else None
    server.faults["set-tag"] = server.faults["log-batch"]
    run = track(tmp_path / "run", {"a [1]": 1.0, "b": 2.0}, params={"p [1]": 1})
    assert run.data.metrics == {fit("a [1]"): 1.0, "b": 2.0}
    assert run.data.params[fit("p [1]")] == "1"
    assert {item.what for item in read_sent(tmp_path / "run").left_out} == {
        f"tag {ORIGINAL}{fit(name)}" for name in ("a [1]", "p [1]")
    }
    server.faults.clear()
    assert replay(tmp_path / "run")[1] == []
    tags = client().get_run(run.info.run_id).data.tags
    assert tags[ORIGINAL + fit("a [1]")] == "a [1]"


def test_a_run_deleted_under_way_is_named_once_and_waits(
    tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    with MlflowTracker(tmp_path / "run", record()) as tracker:
        until(lambda: tracker.run_id is not None and not tracker._journal.pending)
        client().delete_run(tracker.run_id)
        for step in range(5):
            tracker.metrics({"a": 1.0}, step)
        tracker.conclude("FINISHED")
    assert caplog.text.count(f"run {tracker.run_id} was deleted; restore it: mlflow runs") == 2
    assert not read_sent(tmp_path / "run").left_out
    with pytest.raises(ValueError, match=f"{tracker.run_id} was deleted; restore it"):
        MlflowTracker(tmp_path / "run", record())
    assert command(["replay", str(tmp_path / "run")]) == 2
    client().restore_run(tracker.run_id)
    assert replay(tmp_path / "run") == (6, [])
    assert len(client().get_metric_history(tracker.run_id, "a")) == 5


def until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("not within 10 s")


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("file:{folder}/mlruns", "filesystem tracking backend"),
        ("nosuch://server", "unsupported URI"),
        ("postgresql+nosuchdriver://u:secretword@h/db", "MLflow cannot use postgresql"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
    ],
)
def test_a_store_that_cannot_be_is_refused_before_training(
    tiny: Write, tmp_path: Path, uri: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.db").write_text("a text, and no database at all")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    with pytest.raises(ValueError, match=fault) as refused:
        single(tiny("run"), "tracking.enabled=true")
    assert "\n" not in str(refused.value) and "secretword" not in str(refused.value)
    assert not list((tmp_path / "run").glob("step-*"))
    single(tiny("run"), "tracking.enabled=false", "train.max_steps=1")  # nothing is in the way


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"experiment": "  "}, "tracking.experiment is '  '"),
        ({"experiment": "x" * 501}, "MLflow takes 1 to 500 letters"),
        ({"tags": {"a[0]": "x"}}, r"tracking.tags: 'a\[0\]' is no name for MLflow"),
        ({"tags": {"": "x"}}, "tracking.tags: '' is no name"),
        ({"adopted": "0" * 32}, "MLflow has no run 00000"),
    ],
)
def test_what_no_server_takes_is_refused_before_training(
    tmp_path: Path, server: TrackingServer, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        MlflowTracker(tmp_path / "run", record(**changes))
    assert client().get_experiment_by_name("lanes") is None


def test_a_deleted_experiment_is_refused_and_another_name_helps(
    tmp_path: Path, server: TrackingServer
) -> None:
    client().delete_experiment(client().create_experiment("lanes"))
    with pytest.raises(ValueError, match="'lanes' was deleted; restore it: mlflow experiments"):
        MlflowTracker(tmp_path / "run", record())
    run = track(tmp_path / "run", {"a": 1.0}, experiment="other")
    assert run.data.metrics == {"a": 1.0}


@pytest.mark.parametrize("answer", [(503, "busy"), (500, "{}"), (401, "who?"), (403, "Host")])
def test_a_server_that_is_merely_away_stops_no_training(
    tmp_path: Path, server: TrackingServer, answer: tuple[int, str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.faults["api"] = answer
    with MlflowTracker(tmp_path / "run", record()) as tracker:
        tracker.metrics({"a": 1.0}, 1)
        until(lambda: "failed, its journal grows" in caplog.text)
        assert ('--allowed-hosts "NODE:*' in caplog.text) == (answer[0] == 403)
        assert ("MLFLOW_TRACKING_USERNAME" in caplog.text) == (answer[0] == 401)
        server.faults.clear()
        until(lambda: tracker.run_id is not None)
    assert client().get_run(tracker.run_id).data.metrics == {"a": 1.0}


def test_a_server_that_hangs_is_waited_for_so_long(
    tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    server.faults["api"] = lambda _: (503, "") if release.wait(20) else None
    monkeypatch.setattr(tracking, "CHECK_S", 0.2)
    monkeypatch.setattr(tracking, "SHORT_DRAIN_S", 0.2)
    began_s = time.monotonic()
    with MlflowTracker(tmp_path / "run", record()) as tracker:
        tracker.metrics({"a": 1.0}, 1)
    assert time.monotonic() - began_s < 5
    release.set()


def test_errors_are_told_apart_in_one_place() -> None:
    def with_status(status: int) -> MlflowException:
        return MlflowException(f"request failed with error code {status} != 200")

    assert all(is_refusal(with_status(status)) for status in (400, 404, 413, 422, 501))
    assert not any(is_refusal(with_status(s)) for s in (401, 403, 408, 429, 500, 502, 503, 504))
    assert is_refusal(MlflowException.invalid_parameter_value("x"))
    assert is_refusal(ModuleNotFoundError("No module named 'boto3'"))
    assert not any(map(is_refusal, (OSError("x"), TimeoutError(), MlflowException("x"))))
    assert reason_of(TimeoutError()) == "TimeoutError"


def test_journals_of_one_lane_go_on(tmp_path: Path, server: TrackingServer) -> None:
    """`delivered` was one number: of five records, the run and an artifact had arrived."""
    run = track(tmp_path / "run", {"a": 1.0})
    sent = {"delivered": 3, "run_id": run.info.run_id}  # run, status, artifact
    (tmp_path / "run" / SENT).write_text(json.dumps(sent))
    server.asked.clear()
    assert [r["kind"] for r in Journal(tmp_path / "run").pending] == ["metrics"] * 2 + ["status"]
    assert replay(tmp_path / "run") == (3, [])
    assert not [path for path in server.asked if "artifacts" in path or "runs/create" in path]
    assert json.loads((tmp_path / "run" / SENT).read_text())["settled"] == {
        "records": 5, "artifacts": 2, "models": 0,
    }  # fmt: skip
    assert (tmp_path / "run" / NAME).read_text().count("\n") == 7


@pytest.mark.slow
def test_the_schedulers_experiment_and_run(
    tiny: Write, tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nightly")
    assert load_config(tiny("run")).tracking.experiment == "nightly"
    chosen = load_config(tiny("run"), ["tracking.experiment=mine"])
    assert chosen.tracking.experiment == "mine"
    made = client().create_run(client().create_experiment("nightly"), tags={"who": "cron"})
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    single(tiny("run"), "tracking.enabled=true", "train.max_steps=2")
    run = client().get_run(made.info.run_id)
    assert run.info.status == "FINISHED" and "val/accuracy" in run.data.metrics
    assert run.data.tags["who"] == "cron" and run.data.params["train.max_steps"] == "2"
    # A run of an ablation has one of its own
    single(tiny("child"), "tracking.enabled=true", "train.max_steps=2", "tracking.parent=grid")
    assert read_sent(tmp_path / "child").run_id != made.info.run_id
    # The same command resumes the run that it began, whatever a later job is given
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    single(tiny("run"), "tracking.enabled=true", "train.max_steps=4")
    history = client().get_metric_history(made.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4]


def test_the_reason_why_no_experiment_is_made_is_the_servers(
    tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = json.dumps({"error_code": "PERMISSION_DENIED", "message": "ask the owner"})
    server.faults["experiments/create"] = (403, refusal)
    folder = tmp_path / "run"
    folder.mkdir()
    with MlflowTracker(folder, record()) as tracker:
        tracker.metrics({"a": 1.0}, 1)
    assert "failed, its journal grows: PERMISSION_DENIED: ask the owner" in caplog.text
    server.faults.clear()
    assert replay(folder)[0] and client().get_experiment_by_name("lanes")
