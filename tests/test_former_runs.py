"""Runs and checkpoints of commit 65e315c resume and evaluate.

tests/data/65e315c.json holds the layout of two runs of that commit, preempted after step 14: DAN by
Adam on `faces`, and a backbone by SGD on `people` (tests/conftest.py), which it has drawn. Names,
shapes, dtypes and plain values are there; tensors are filled from a seed, the words in braces by
the test.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from conftest import DAN, IDENTITY, TINY, history, outcome, single
from dan_dist.evaluation import evaluate
from dan_dist.options import EvaluateOptions
from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path
from dan_dist.tracking.journal_files import read_sent
from dan_dist.tracking.tracker import replay
from shards.format import ShardSet

LAYOUT = Path(__file__).parent / "data" / "65e315c.json"
STOPPED, END = 14, 20
OPTIONS = {
    "dan": [*DAN, "optim.name=adam", "optim.lr=1e-3", "model.width=64"],
    "identity": [
        *IDENTITY,
        "model.width=64",
        "loss.classification=arcface",
        "data.synthetic={train: 80, val: 60, "
        "size: 32, seed: 7, by: identity, identities: 16, held_out: 20}",
    ],
}


def fill(value: Any, name: str, random: torch.Generator) -> Any:
    """What a layout describes: tensors of small numbers, variances and second moments positive."""
    if isinstance(value, list):
        return [fill(item, name, random) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(fill(value["tuple"], name, random))
    if "items" in value:
        return {key: fill(item, name, random) for key, item in value["items"]}
    if "tensor" not in value:
        return {key: fill(item, key, random) for key, item in value.items()}
    dtype = getattr(torch, value["dtype"])
    if "value" in value:
        return torch.tensor(value["value"], dtype=dtype)
    numbers = 0.02 * torch.randn(value["tensor"], generator=random)
    if dtype == torch.bool:
        return numbers > 0
    is_positive = name.endswith(("running_var", "exp_avg_sq"))
    return (numbers.abs() + 1e-4 if is_positive else numbers).to(dtype)


def describe(value: Any) -> Any:
    """The layout of nested dicts: names, shapes and dtypes."""
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    return (tuple(value.shape), value.dtype) if torch.is_tensor(value) else type(value)


def rebuild(name: str, data: ShardSet, folder: Path, empty_store: Path) -> Path:
    """The folder of a run of that commit, and MLflow's store with its records, in `folder`."""
    shutil.copy(empty_store, folder)
    text = json.dumps(json.loads(LAYOUT.read_text())[name])
    for placeholder, value in {"{folder}": str(folder), "{shards}": str(data.root),
                               "{fingerprint}": data.fingerprint}.items():  # fmt: skip
        text = text.replace(placeholder, value)
    run = folder / name
    run.mkdir()
    journal = "\n".join(json.dumps(record) for record in json.loads(text)["journal.jsonl"]) + "\n"
    (run / "journal.jsonl").write_text(journal)
    arrived, left_out = replay(run)  # all but the journal's own line, and files that are not here
    assert arrived + len(left_out) == journal.count("\n") - 1
    run_id = read_sent(run)[1]
    assert run_id is not None
    files = json.loads(text.replace("{run_id}", run_id))
    for file in ("journal.sent", "outcome.json"):
        (run / file).write_text(json.dumps(files[file]))
    random = torch.Generator().manual_seed(0)
    for file in (step_path(run, STOPPED).name, checkpoint.BEST):
        torch.save(fill(files[file], file, random), run / file)
    return run


@pytest.fixture(params=["dan", "identity"])
def former(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    faces: ShardSet, people: ShardSet, empty_store: Path,
) -> tuple[str, Path, ShardSet]:  # fmt: skip
    """Name, folder and data of a run of that commit."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = faces if request.param == "dan" else people
    return request.param, rebuild(request.param, data, tmp_path, empty_store), data


@pytest.mark.slow
def test_a_run_goes_on(
    former: tuple[str, Path, ShardSet], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its configuration holds keys that were renamed since; its MLflow run is the same."""
    name, run, data = former
    before = checkpoint.read(step_path(run, STOPPED))
    assert before["config"]["loss"]["lambda_affinity"] == 1.0
    config = tmp_path / "again.yaml"
    config.write_text(TINY.format(shards=data.root, output=run))
    caplog.set_level("INFO")
    options = [*OPTIONS[name], "tracking.enabled=true", "train.epochs=4", f"train.max_steps={END}"]
    ended = single(config, *options)
    assert ended.status == "finished" and outcome(run)["step"] == END
    assert f"resumed after step {STOPPED} from {step_path(run, STOPPED)}" in caplog.text
    after = checkpoint.read(step_path(run, END))
    for part in ("objective", "optimizer"):
        assert describe(after[part]) == describe(before[part]), part
    if name == "dan":
        assert after["optimizer"]["state"][0]["step"] == END
    assert after["run_id"] == before["run_id"]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert [step for step, _ in history(store)] == list(range(1, END + 1))
    assert mlflow.MlflowClient(store).get_run(after["run_id"]).info.status == "FINISHED"


@pytest.mark.slow
def test_its_optimiser_and_statistics_are_taken_over(
    former: tuple[str, Path, ShardSet], tmp_path: Path
) -> None:
    """Ended where it is: all tensors are written again as they were read."""
    name, run, data = former
    before = checkpoint.read(step_path(run, STOPPED))
    config = tmp_path / "again.yaml"
    config.write_text(TINY.format(shards=data.root, output=run))
    options = [*OPTIONS[name], "train.epochs=4", f"train.max_steps={STOPPED}"]
    assert single(config, *options).status == "finished"
    after = checkpoint.read(step_path(run, STOPPED))
    assert after["evaluated"] == STOPPED and before["evaluated"] == 10  # it was written anew
    moments = [(s["optimizer"]["state"], s["objective"]) for s in (before, after)]
    for old, new in zip(*moments, strict=True):
        for key, value in old.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, tensor in parts:
                other = new[key][part] if part else new[key]
                assert other is tensor or torch.equal(other, tensor), (key, part)


@pytest.mark.slow
def test_its_best_checkpoint_is_evaluated(former: tuple[str, Path, ShardSet]) -> None:
    name, run, data = former
    report = evaluate.main(EvaluateOptions(checkpoint=run, data=str(data.root), no_tracking=True))
    assert 0 <= report["accuracy"] <= 1
    assert report["images" if name == "dan" else "pairs"] == (16 if name == "dan" else 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("loss.lambda_fcn=0.5", r"another configuration: loss\.lambda_fcn was 1\.0, is 0\.5"),
        ("optim.lr=1e-4", r"another configuration: optim\.lr was 0\.001, is 0\.0001"),
    ],
)
def test_another_configuration_is_refused(
    faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, line: str,
    empty_store: Path,
) -> None:  # fmt: skip
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = rebuild("dan", faces, tmp_path, empty_store)
    config = tmp_path / "again.yaml"
    config.write_text(TINY.format(shards=faces.root, output=run))
    with pytest.raises(ValueError, match=line):
        single(config, *OPTIONS["dan"], "train.epochs=4", change)
