"""Whole trainings of the real network at small size: the claims that users rely on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import (
    ALONE,
    DAN,
    REPOSITORY,
    SCRIPT,
    copied,
    errors,
    largest_difference,
    launch,
    run,
    single,
    torchrun,
    train,
    weights,
)
from dan_dist.config import Optim, load_config
from dan_dist.data.loader import Batch
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.model.dan import DAN as NETWORK
from dan_dist.model.losses import Objective
from dan_dist.run import checkpoint
from dan_dist.run.folder import newest_checkpoint, step_path
from shards.demo import ensure
from shards.releases import synthetic

Write = Callable[[str], Path]


# From a random start DAN is chaotic: a difference of 1e-16 grows to 1 within some 10 steps at
# the recipes' learning rates (the partition loss is steepest where heads agree), and within 50 at
# 1e-6. At 1e-7 the gradients are DAN's all the same, and the weights move by what is asserted.
EQUAL = {
    "partition": [*DAN, "optim.lr=1e-7", "optim.momentum=0.0"],
    "partition_release": [
        *DAN,
        "loss.afn=partition_release",
        "optim.lr=1e-7",
        "optim.momentum=0.0",
    ],
    "arcface": ["loss.classification=arcface", "optim.lr=1e-4", "model.width=64"],
}
both_tasks = pytest.mark.parametrize(
    "task", ["expression", pytest.param("identity", marks=pytest.mark.slow)], indirect=True
)


@pytest.mark.parametrize(
    ("case", "ranks", "steps", "task"),
    [
        ("partition", 3, 15, "expression"),
        pytest.param("partition", 3, 50, "expression", marks=pytest.mark.slow),
        pytest.param("partition_release", 2, 15, "expression", marks=pytest.mark.slow),
        pytest.param("arcface", 3, 15, "identity", marks=pytest.mark.slow),
    ],
    indirect=["task"],
)
def test_two_and_three_ranks_equal_one(
    tiny: Write, tmp_path: Path, case: str, ranks: int, steps: int, task: list[str]
) -> None:
    """In float64, DAN over 15 and 50 steps; three ranks do not divide the global batch of 8."""
    options = [*task, *EQUAL[case], "train.precision=float64", f"train.max_steps={steps}"]
    options += ["train.epochs=5"]
    single(tiny("one"), *options, "train.max_steps=1")
    start = weights(tmp_path / "one")
    single(tiny("one"), *options)
    one = weights(tmp_path / "one")
    assert largest_difference(start, one, only="weight") > 1e-6  # it was trained
    train(ranks, tiny("many"), *options, cwd=tmp_path)
    assert largest_difference(one, weights(tmp_path / "many")) < 1e-9


def test_accumulation_gives_the_same_gradient_where_no_batch_statistics_are_in_play() -> None:
    """Micro-batches and whole batches differ by BatchNorm's statistics alone."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32).double(), torch.arange(8)
    gradients = []
    for micro_batch in (None, 3):
        torch.manual_seed(1)
        engine = Engine(
            Objective(NETWORK(8, 2), 8), ALONE, Optim(name="sgd"),
            StepOptions(global_batch=8, micro_batch=micro_batch, precision="float64"),
        )  # fmt: skip
        for module in engine.objective.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.train = lambda mode=True, module=module: module  # stays in evaluation
                module.training = False
        result = engine.train_step(
            Batch(images, labels, labels), lr=0.0, flags=StepFlags(False, False, 0)
        )
        own = [p.grad.clone() for p in engine.objective.parameters()]
        gradients.append([*own, result.losses, result.grad_norm])
    for whole, micro in zip(*gradients, strict=True):
        assert torch.allclose(whole, micro, rtol=1e-9, atol=1e-12)


@both_tasks
def test_resumed_equals_uninterrupted_bit_for_bit(
    tiny: Write, tmp_path: Path, task: list[str]
) -> None:
    """In mid-epoch, across an epoch's border, and in float32 with Adam as the recipes have it."""
    options = [*(task or DAN), "optim.name=adam", "optim.lr=1e-3"]
    whole = single(tiny("whole"), *options).metrics
    for stop in (7, 13):  # 10 steps an epoch
        assert stop % 10
        single(tiny("parts"), *options, f"train.max_steps={stop}")
    parts = single(tiny("parts"), *options).metrics
    assert whole == parts
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    both = [checkpoint.load(tmp_path / n / checkpoint.BEST) for n in ("whole", "parts")]
    # the ends in between were evaluated as well, and may have found a better one
    assert both[0]["best"]["accuracy"] <= both[1]["best"]["accuracy"]


@pytest.mark.slow
@both_tasks
def test_resume_at_another_world_size_goes_on_with_the_same_batches(
    tiny: Write, tmp_path: Path, task: list[str]
) -> None:
    options = [*task, "train.precision=float64"]
    single(tiny("whole"), *options)
    single(tiny("parts"), *options, "train.max_steps=7")
    out = train(2, tiny("parts"), *options, cwd=tmp_path)
    assert "resumed after step 7" in out
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-9


def test_a_checkpoint_that_does_not_know_all_keys_is_gone_on_with(
    baseline_run: Path, tiny: Write, tmp_path: Path
) -> None:
    """Those of earlier versions: what they lack has its default."""
    path = step_path(copied(baseline_run, tmp_path / "run"), 10)
    content = checkpoint.read(path)
    del content["right"], content["config"]["task"], content["config"]["data"]["pairs"]
    checkpoint.save(path, content)
    assert single(tiny("run"), "train.max_steps=12").status == "finished"
    with pytest.raises(ValueError, match=r"data\.pairs was 6000, is 60"):
        single(tiny("run"), "data.pairs=60")


@pytest.mark.slow
def test_checkpoints_are_whole_and_few(tiny: Write, tmp_path: Path) -> None:
    single(tiny("run"), *DAN, "train.checkpoint_every=6", "train.keep_checkpoints=2")
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    steps = ["step-00000018.pt", "step-00000020.pt"]
    others = ["config.yaml", "outcome.json", "predictions.parquet"]
    assert names == ["best.pt", *others, *steps]
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert best["class_names"][1] == "happy" and "optimizer" not in best
    assert "centers" in best["objective"] and best["config"]["model"]["heads"] == 2


@pytest.mark.slow
def test_mlflow_holds_one_run_and_resume_continues_it(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = ["tracking.enabled=true", "train.log_every=5"]
    train(2, tiny("run"), *options, "train.max_steps=10", cwd=tmp_path)
    out = train(1, tiny("run"), *options, cwd=tmp_path)
    assert f"mlflow ui --backend-store-uri {store}" in out
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("dan_dist")
    (run_,) = client.search_runs([experiment.experiment_id])  # two ranks, two starts: one run
    assert run_.info.status == "FINISHED" and run_.info.run_name == "run"
    assert run_.data.params["model.heads"] == "0" and run_.data.tags["dataset"] == "synthetic"
    assert run_.data.tags["release"] == "seed 7, 32 px" and len(run_.data.tags["commit"]) >= 7
    steps = [m.step for m in client.get_metric_history(run_.info.run_id, "train/loss")]
    assert steps == [5, 10, 15, 20]
    steps = [m.step for m in client.get_metric_history(run_.info.run_id, "val/accuracy")]
    assert steps == [0, 10, 20]
    assert {
        "val/recall/happy",
        "train/wait_share",
        "train/images_per_s",
    } <= run_.data.metrics.keys()
    artifacts = {a.path for a in client.list_artifacts(run_.info.run_id)}
    assert {
        "config.yaml",
        "confusion_matrix.png",
        "training_images.png",
    } <= artifacts
    models = [client.get_logged_model(m.model_id) for m in run_.outputs.model_outputs]
    assert {model.status for model in models} == {"READY"}  # of each start's best epoch


def test_evaluation_is_the_same_on_any_number_of_ranks(tiny: Write, tmp_path: Path) -> None:
    """The confusion matrix behind the metrics counts each of 16 images once: steps of 1/16."""
    options = ["train.precision=float64", "train.max_steps=5"]
    one = single(tiny("one"), *options).metrics
    train(3, tiny("three"), *options, cwd=tmp_path)
    content = newest_checkpoint(tmp_path / "three")
    assert content is not None and content[1]["metrics"] == one
    assert one["accuracy"] * 16 == round(one["accuracy"] * 16)


@pytest.mark.slow
def test_without_sync_bn_ranks_still_agree_on_what_is_saved(tiny: Write, tmp_path: Path) -> None:
    out = train(2, tiny("run"), "model.sync_bn=false", "train.max_steps=4", cwd=tmp_path)
    assert "finished after 4 steps" in out


BAD: dict[str, tuple[list[str], str]] = {
    "misspelt key": (
        ["train.epoch=3"],
        r"unknown key 'train\.epoch'; did you mean 'train\.epochs'",
    ),
    "unknown section": (["modell.heads=3"], r"unknown key 'modell'; did you mean 'model'"),
    "wrong type": (["train.epochs=many"], r"train\.epochs is 'many': input should be a valid int"),
    "not an override": (["epochs"], r"override 'epochs': expected section\.key=value"),
    "no shards": (["data.shards=/nowhere"], r"/nowhere/manifest\.json not found"),
    "class count": (["data.classes=[a, b]"], r"data\.classes has 2 classes .* has 8 \(neutral, h"),
    "batch too large": (["train.global_batch=81"], r"80 training images, fewer than .* \(81\)"),
    "no such split": (["data.val_split=test"], r"no split 'test', it has train, val"),
    "no backbone": (["model.backbone=/no.pth"], r"/no\.pth: no such file; give the path"),
    "image size": (["model.image_size=50"], r"model\.image_size is 50: .*multiple of 32"),
    "BatchNorm of one": (["train.micro_batch=1"], r"leaves BatchNorm 1 images"),
    "unwritable": (["train.output=/proc/run"], r"train\.output /proc/run cannot be written"),
    "no GPU": (["train.device=cuda"], r"train\.device is cuda, but torch finds no GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_training(tiny: Write, tmp_path: Path, case: str) -> None:
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    overrides, message = BAD[case]
    with pytest.raises((ValueError, OSError), match=message) as caught:
        single(tiny("run"), *overrides)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path).rglob("*.pt*"))


def test_a_checkpoint_of_something_else_is_refused(
    baseline_run: Path, tiny: Write, tmp_path: Path
) -> None:
    copied(baseline_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration: model\.heads was 0, is 4"):
        single(tiny("run"), "model.heads=4")
    with pytest.raises(ValueError, match=r"of an earlier run; train\.resume=auto resumes it"):
        single(tiny("run"), "train.resume=never")
    ensure(tmp_path / "other", synthetic.release(80, 16, size=32, seed=8), size=32)
    with pytest.raises(ValueError, match="was trained on other images"):
        single(tiny("run"), f"data.shards={tmp_path / 'other'}")


@pytest.mark.slow
def test_the_command_prints_one_line_and_fails(tiny: Write, tmp_path: Path) -> None:
    done = run(sys.executable, SCRIPT, tiny("run"), "train.epoch=1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "epochs" in done.stderr
    done = run(*torchrun(3), SCRIPT, tiny("run"), "train.global_batch=2", cwd=tmp_path)
    assert done.returncode != 0
    assert errors(done) == ["error: 3 ranks, more than train.global_batch (2)"]


def test_a_non_finite_loss_stops_all_ranks_and_names_the_step(tiny: Write, tmp_path: Path) -> None:
    options = ["optim.lr=1e6", "loss.fcn=center", "loss.lambda_fcn=1e6"]
    done = launch("train", 2, tiny("run"), *options, cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1
    assert "the loss is not finite at step 2 (loss " in errors(done)[0]
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.slow
def test_the_demo_makes_its_own_shards(tmp_path: Path) -> None:
    """The documented command from another working folder, with a smaller budget."""
    options = ["data.synthetic.train=64", "data.synthetic.val=8", "data.synthetic.size=32"]
    small = ["model.image_size=32", "train.global_batch=16", "train.epochs=1", "train.log_every=2"]
    done = run(*torchrun(2), SCRIPT, *options, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drawing 72 faces into data/demo" in done.stdout
    assert "finished after 4 steps" in done.stdout and "img/s, waiting for data" in done.stdout
    assert (tmp_path / "data" / "demo" / "contact_sheet.png").exists()
    assert (tmp_path / "mlflow.db").exists() and (tmp_path / "runs" / "demo" / "best.pt").exists()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(f"configs/{path.name}")
    assert json.dumps(config.model_dump())
    assert config.train.output == f"runs/{path.stem}"


def test_numbers_in_yaml_are_numbers(tiny: Write) -> None:
    assert load_config(tiny("run"), ["optim.lr=1e-4"]).optim.lr == 1e-4
    assert load_config(tiny("run"), ["optim.lr=5E-3"]).optim.lr == 5e-3
    assert load_config(tiny("run"), ["data.val_split=1e5x"]).data.val_split == "1e5x"
