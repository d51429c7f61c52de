"""A refused input, tag or metric keeps no other from MLflow; what it would cut is refused first."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from tracking_server import TrackingServer

from dan_dist.config import load_config
from dan_dist.record import open_tracker
from dan_dist.tracking import inputs
from dan_dist.tracking.faults import PartlyRefusedError
from dan_dist.tracking.inputs import DatasetInput
from dan_dist.tracking.parent import ParentRecord, publish
from dan_dist.tracking.store import connect

Write = Callable[[str], Path]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "run_name=" + "r" * 251,
            r"tracking\.run_name is 'r{100}'…: MLflow takes 0 to 250 letters",
        ),
        ("run_name=a\udc80", r"tracking\.run_name is 'a\\udc80': MLflow takes"),
        ("tags.note=" + "n" * 5001, r"tracking\.tags\.note is 'n{100}'…: MLflow takes 0 to 5000"),
        ('tags={a b: "x\\0y"}', r"tracking\.tags\.a b is 'x\\x00y': MLflow takes .* without NUL"),
        ("experiment=a\ud800", r"tracking\.experiment is 'a\\ud800'"),
    ],
)
def test_what_mlflow_would_cut_is_refused_before_training(
    tiny: Write, word: str, line: str
) -> None:
    config = load_config(tiny("run"), ["tracking.enabled=true", f"tracking.{word}"])
    world: Any = SimpleNamespace(is_main=True)
    nothing: Any = None
    with pytest.raises(ValueError, match=f"^{line}"):
        open_tracker(config, world, nothing, {}, 8, nothing)
    assert not Path("run").exists()


def refusing(*names: str) -> Callable[..., None]:
    """Refuses what has one of these names."""

    def send(run_id: str, datasets: Any = (), models: Any = ()) -> None:
        given = [d.dataset.name for d in datasets] + [m.model_id for m in models]
        if bad := {*names} & {*given}:
            raise MlflowException.invalid_parameter_value(f"not {bad.pop()}")
        arrived.extend(given)

    arrived: list[str] = []
    send.arrived = arrived  # type: ignore[attr-defined]
    return send


@pytest.mark.parametrize("refused", [["b/val"], ["a/train", "b/val"], ["m-1"], []])
def test_a_refused_input_keeps_no_other_from_its_run(
    refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a/train", "b/val", "c/test"]
    datasets = [
        DatasetInput(n, "f" * 64, "train", "s3://x", "r", {"num_rows": 1})._asdict() for n in names
    ]
    monkeypatch.setattr(inputs, "find_model", lambda *_: (None, "m-1"))
    send: Any = refusing(*refused)
    run = SimpleNamespace(inputs=None)
    own = SimpleNamespace(log_inputs=send, get_run=lambda _: run)
    record = {"datasets": datasets, "model": ["r", 1]}
    with nullcontext() if not refused else pytest.raises(PartlyRefusedError) as raised:
        inputs.log_inputs(own, "r", record, "http://x")
    assert send.arrived == [name for name in [*names, "m-1"] if name not in refused]
    if refused:
        found = [what.split()[-1] for what in raised.value.refused]
        assert found == refused


def test_a_refused_tag_costs_an_ablations_parent_nothing_else(
    tmp_path: Path, server: TrackingServer, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"})
    server.faults["log-batch"] = lambda body: (400, refusal) if b'"odd' in body else None
    server.faults["set-experiment-tag"] = (400, refusal)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("x")
    parent = ParentRecord(
        experiment="lanes", name="grid", title="heads 1, 2", note="n", status="FINISHED",
        metrics={"odd m": 1.0, "best/accuracy": 0.5}, tags={"odd t": "x", "answer": "y"},
    )  # fmt: skip
    page = publish(tmp_path / "out", parent, []).run
    client = connect(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(page.split("/runs/")[1].split("?")[0])
    assert run.info.status == "FINISHED" and run.data.metrics == {"best/accuracy": 0.5}
    assert run.data.tags["answer"] == "y" and "odd t" not in run.data.tags
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["table.md"]
    for what in ("metric odd m", "tag odd t", "view grid"):
        assert caplog.text.count(f"left out of MLflow: {what}: ") == 1
