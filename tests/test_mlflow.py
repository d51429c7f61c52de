"""What MLflow's users look for: accuracy first, data sets, origin, load, links, true names."""

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch.distributed import HashStore
from tracking_server import TrackingServer

from conftest import copied, single
from dan_dist import certificate
from dan_dist.config import load_config
from dan_dist.distributed.world import World
from dan_dist.evaluation import evaluate, matrix
from dan_dist.evaluation.records import image_keys
from dan_dist.inference import explain
from dan_dist.model.weights import load_trained
from dan_dist.options import CertifyOptions, EvaluateCommand, EvaluateOptions, ExplainOptions
from dan_dist.run import checkpoint
from dan_dist.run.results import result_folder
from dan_dist.tracking import sender, system_metrics
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.__main__ import main as command
from dan_dist.tracking.faults import PendingError
from dan_dist.tracking.inputs import find_model, model_of
from dan_dist.tracking.journal_files import read_records, read_sent
from dan_dist.tracking.store import connect
from dan_dist.tracking.system_metrics import SystemMetrics
from dan_dist.tracking.tracker import MlflowTracker, NullTracker, RunRecord, replay
from shards.format import ShardSet

Write = Callable[[str], Path]
RECORD = RunRecord(experiment="e", name="n", params={}, config={})


def client() -> Any:
    return connect(os.environ["MLFLOW_TRACKING_URI"])


@pytest.mark.slow
def test_accuracy_first_and_runs_found_by_data_and_code(
    tiny: Write, faces: ShardSet, tmp_path: Path, server: TrackingServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The server takes no inputs at first: they arrive later, once."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    server.faults["log-inputs"] = (503, "busy")
    single(tiny("run"), "tracking.enabled=true", "train.max_steps=2", "train.profile=1")
    server.faults.clear()
    replay(tmp_path / "run")
    api, run_id = client(), read_sent(tmp_path / "run").run_id
    run = api.get_run(run_id)
    keys = [*run.data.metrics]
    assert keys[0] == "val/accuracy" and not [key for key in keys if key.startswith("model/")]
    assert [m.step for m in api.get_metric_history(run_id, "val/accuracy")] == [0, 2]
    assert run.data.metrics["val/loss"] > 0 and 0 <= run.data.metrics["train/accuracy"] <= 1
    assert run.data.metrics["train/accuracy"] * 8 % 1 == 0  # the mean of one step of 8 images
    assert any(key.startswith("system/") for key in run.data.metrics)
    assert not [key for key in run.data.params if key.startswith(("tracking.", "train.output"))]
    tags = run.data.tags
    assert int(tags["network.parameters"]) == 703_128 and tags["output"] == str(tmp_path / "run")
    assert tags["mlflow.source.git.commit"] == tags["commit"] and len(tags["commit"]) == 40
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.git.branch"} <= tags.keys()
    assert tags["mlflow.source.git.dirty"] in ("true", "false")
    assert tags["version.torch"] == torch.__version__ and tags["version.dali"]

    digest, number = faces.fingerprint[:32], run.info.experiment_id
    for query in ("name = 'synthetic/train'", f"digest = '{digest}'", "context = 'val'"):
        (found,) = api.search_runs([number], f"dataset.{query}")
        assert found.info.run_id == run_id
    inputs = run.inputs.dataset_inputs
    by_context = {t.value: i for i in inputs for t in i.tags if t.key == "mlflow.data.context"}
    assert len(inputs) == 2 and by_context.keys() == {"train", "val"}
    assert {t.value for t in by_context["val"].tags} >= {faces.fingerprint, faces.release}
    profile = json.loads(by_context["train"].dataset.profile)
    assert profile["num_rows"] == 80 and sum(profile["images"].values()) == 80


@pytest.mark.slow
def test_a_trace_of_some_steps_is_an_artifact(tiny: Write, tmp_path: Path, store: str) -> None:
    single(tiny("run"), "tracking.enabled=true", "train.max_steps=6", "train.profile=2")
    (path,) = (tmp_path / "run" / "profile").glob("*.json.gz")
    trace = pd.read_json(path, typ="series")["traceEvents"]
    steps = {event["name"] for event in trace if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2
    run_id = read_sent(tmp_path / "run").run_id
    (artifact,) = client().list_artifacts(run_id, "profile")
    assert artifact.path == f"profile/{path.name}"


def test_the_load_of_two_nodes_is_in_one_run_once(
    tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is away meanwhile; a store that fails costs samples alone."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    shared, device = HashStore(), torch.device("cpu")
    worlds = [World(rank, 0, 2, 1, device, shared) for rank in range(2)]
    server.faults["api"] = (503, "busy")
    with MlflowTracker(tmp_path / "run", RECORD) as tracker:
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "node-a")
        main = SystemMetrics(tracker, worlds[0])
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_NODE_ID", "node-b")
        other = SystemMetrics(NullTracker(), worlds[1])
        with main:
            with other:
                other._ended.wait(0.5)
            main._ended.wait(0.3)
        tracker.metrics({"val/accuracy": 0.1}, 0)
    first, *samples = [r for r in read_records(tmp_path / "run") if r["kind"] == "metrics"]
    assert [*first["values"]] == ["val/accuracy"]  # on which MLflow's pages open
    assert len(samples) > 3
    server.faults.clear()
    replay(tmp_path / "run")
    run_id = read_sent(tmp_path / "run").run_id
    for node in ("node-a", "node-b"):
        points = client().get_metric_history(run_id, f"system/{node}/cpu_utilization_percentage")
        steps = [point.step for point in points]
        assert steps and len(set(steps)) == len(steps)
    names = client().get_run(run_id).data.metrics
    for part in ("system_memory_usage", "disk_usage", "network_receive"):
        assert any(part in name for name in names), part


def test_an_evaluation_is_at_the_model_and_at_its_data(
    dan_run: Path, faces: ShardSet, tmp_path: Path, store: str
) -> None:
    run = copied(dan_run, tmp_path / "run")
    shutil.copy(dan_run.parent / "mlflow.db", tmp_path)
    options = EvaluateOptions(checkpoint=run, data=str(faces.root), split="train")
    report = evaluate.main(options)
    api = client()
    (number,) = [e.experiment_id for e in api.search_experiments() if e.name == "dan_dist"]
    (own,) = api.search_runs([number], "tags.kind = 'evaluation'")
    (linked,) = api.get_run(own.info.run_id).inputs.model_inputs  # which a search leaves out
    model = api.get_logged_model(linked.model_id)
    assert model.source_run_id == own.data.tags["trained_by"]
    values = {m.key: m for m in model.metrics}
    assert values["eval/accuracy"].value == report["accuracy"]
    assert values["eval/accuracy"].dataset_name == "synthetic/train"
    averaged = load_trained(run)._replace(facts={"has_average": True})
    assert find_model(api, model_of(averaged), store) == (model.source_run_id, model.model_id)
    other = model_of(averaged, "trained")  # the model serves the average
    assert find_model(api, other, store) == (model.source_run_id, None)
    query = "dataset.name = 'synthetic/train' and tags.kind = 'evaluation'"
    assert len(api.search_runs([number], query)) == 1
    assert command(["register", str(run), "faces"]) == 0
    assert str(api.get_model_version_by_alias("faces", "champion").version) == "1"
    with pytest.raises(ValueError, match="holds no run"):
        from dan_dist.tracking.registry import register

        register(tmp_path, "faces", "champion")


def test_an_evaluation_in_an_outage_is_at_the_model_as_well(
    dan_run: Path, faces: ShardSet, tmp_path: Path, server: TrackingServer
) -> None:
    """Neither the training nor it has reached MLflow; it waits for the training's record."""
    run, content = tmp_path / "run", checkpoint.load(dan_run / "best.pt")
    run.mkdir()
    torch.save({**content, "run_id": None}, run / "best.pt")
    server.faults["api"] = (503, "busy")
    with MlflowTracker(run, RECORD) as tracker:
        tracker.metrics({"val/accuracy": 0.5}, content["step"])
        tracker.conclude("FINISHED", run / "best.pt")
    report = evaluate.main(EvaluateOptions(checkpoint=run, data=str(faces.root)))
    (path,) = run.glob("*/evaluation.json")
    server.faults.clear()
    with pytest.raises(PendingError, match=f"first: python -m .* replay {run}"):
        replay(path.parent)
    server.faults["logged-models"] = (503, "busy")  # the run arrives, its model does not yet
    with pytest.raises(Exception, match="503"):
        replay(run)
    server.faults.clear()
    with pytest.raises(PendingError):
        replay(path.parent)
    assert replay(run)[1] == replay(path.parent)[1] == []
    api, training = client(), read_sent(run).run_id
    own = api.get_run(read_sent(path.parent).run_id)
    assert own.data.tags["trained_by"] == training
    (linked,) = own.inputs.model_inputs
    model = api.get_logged_model(linked.model_id)
    assert model.source_run_id == training
    assert {m.key: m.value for m in model.metrics}["eval/accuracy"] == report["accuracy"]


def test_a_driver_that_fails_costs_the_gpus_samples_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NVMLError(Exception):
        pass

    def count() -> int:
        raise NVMLError("GPU is lost")

    fake = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=count)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("mlflow.system_metrics.metrics.gpu_monitor.pynvml", fake, raising=False)
    assert len(system_metrics._monitors(on_gpu=True)) == 3
    assert "system metrics without the GPUs: GPU is lost" in caplog.text


@pytest.mark.slow
def test_results_of_other_things_are_never_overwritten(
    dan_run: Path, faces: ShardSet, tmp_path: Path
) -> None:
    """Another release of a set, under the same names; the same again replaces its own."""
    run, other = copied(dan_run, tmp_path / "run"), tmp_path / "other"
    shutil.copytree(faces.root, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "release": "another"}))
    lines = "".join(f"{key},{k % 2}\n" for k, key in enumerate(image_keys(faces.split("val"))))
    groups = tmp_path / "groups.csv"
    groups.write_text(f"key,half\n{lines}")
    for data, own in ((faces.root, None), (other, None), (faces.root, None), (other, None),
                      (faces.root, groups), (faces.root, None)):  # fmt: skip
        evaluate.main(EvaluateOptions(checkpoint=run, data=str(data), groups=own, no_tracking=True))
    found = sorted(path.parent.name for path in run.glob("*/evaluation.json"))
    assert found == [f"best-synthetic-val{ending}" for ending in ("", "-2", "-3")]
    assert [path.parent.name for path in run.glob("*/groups.csv")] == found[2:]
    releases = [
        json.loads((run / name / "evaluation.json").read_text())["release"] for name in found
    ]
    assert releases == [faces.release, "another", faces.release]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "r.json").write_text("no json")
    (tmp_path / "x-2").mkdir()
    (tmp_path / "x-2" / "step-00000010.pt").touch()  # a training's
    with result_folder(tmp_path / "x", "r.json", {"a": 1}) as folder:
        assert folder == tmp_path / "x-3"


def test_two_results_of_one_moment_share_no_folder(tmp_path: Path) -> None:
    """The later one waits, and finds what the first has written meanwhile."""
    begun, found = threading.Barrier(2), []

    def write(value: int) -> None:
        begun.wait()
        with result_folder(tmp_path / "x", "r.json", {"a": value}) as folder:
            found.append(folder.name)
            time.sleep(0.3)
            (folder / "r.json").write_text(json.dumps({"a": value}))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (1, 2)))
    assert found == ["x", "x-2"]


def test_a_trainings_folder_takes_no_result(dan_run: Path, tmp_path: Path, store: str) -> None:
    """Which is found out before shards are looked for, copied, or made of images."""
    run = copied(dan_run, tmp_path / "run")
    kept = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    words: dict[str, Any] = {"checkpoint": run, "data": "nowhere", "output": run}
    several: dict[str, Any] = {**words, "checkpoint": (run, run), "data": ("nowhere",)}
    for judge in (
        lambda: evaluate.main(EvaluateOptions(**words)),
        lambda: matrix.main(EvaluateCommand(**several)),
        lambda: explain.main(ExplainOptions(**words)),
    ):
        with pytest.raises(ValueError, match=r"--output .* is the folder of a training"):
            judge()
    assert kept == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_mlflow_is_asked_before_an_evaluation_computes(
    dan_run: Path, faces: ShardSet, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = client()
    api.delete_experiment(api.create_experiment("gone"))
    monkeypatch.setattr(evaluate, "predict", None)
    monkeypatch.setattr(certificate, "launch", None)
    options = EvaluateOptions(checkpoint=dan_run, data=str(faces.root), experiment="gone")
    several = EvaluateCommand(checkpoint=(dan_run,), data=("a", "b"), experiment="gone")
    words = ("demo", "tracking.experiment=gone", "tracking.enabled=true")
    for judge in (
        lambda: evaluate.main(options),
        lambda: matrix.main(several),
        lambda: certificate.main(CertifyOptions(words=words, steps=2)),
    ):
        with pytest.raises(ValueError, match="experiment 'gone' was deleted"):
            judge()


def test_the_schedulers_experiment_by_its_number(
    tiny: Write, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = client().create_experiment("chosen")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    config = load_config(tiny("run"), [])
    assert config.tracking.experiment == f"id:{number}"
    with MlflowTracker(tmp_path / "run", replace(RECORD, experiment=f"id:{number}")) as tracker:
        tracker.metrics({"a": 1.0}, 1)
    (run,) = client().search_runs([number])
    assert run.data.metrics == {"a": 1.0}
    with pytest.raises(ValueError, match="MLflow has no experiment 77, which"):
        MlflowTracker(tmp_path / "other", replace(RECORD, experiment="id:77"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")
    assert load_config(tiny("run"), []).tracking.experiment == "named"


def test_a_record_that_a_server_always_fails_at_holds_nothing_back(
    tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(sender, "TRIES", 2)
    monkeypatch.setattr(sender, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(tracking, "RETRY_S", 5.0)
    server.faults["log-batch"] = lambda body: (500, "{}") if b"poison" in body else None
    caplog.set_level(logging.WARNING)
    with MlflowTracker(tmp_path / "run", RECORD) as tracker:
        tracker.metrics({"poison": 1.0}, 1)
        tracker.metrics({"a": 1.0}, 2)
        tracker.conclude("FINISHED")
    run = client().get_run(read_sent(tmp_path / "run").run_id)
    assert run.data.metrics == {"a": 1.0} and run.info.status == "FINISHED"
    assert "fails at metrics poison" in caplog.text
    server.faults.clear()
    assert replay(tmp_path / "run") == (1, [])
    assert client().get_run(run.info.run_id).data.metrics == {"a": 1.0, "poison": 1.0}
