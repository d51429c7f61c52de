"""Training under DeepSpeed equals training under DDP, and each goes on where the other stopped."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_train import largest_difference, weights

from conftest import DAN, REPOSITORY, TINY, run, train
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.shardset import ShardSet

Write = Callable[[str], Path]
# DeepSpeed's weights are laid out otherwise in memory than DDP's (channels last): convolutions sum
# in another order, and training from a random start is chaotic. Hence the small learning rate; that
# gradients have their right size is shown by one step at a large one.
OPTIONS = [*DAN, "optim.name=adam", "optim.lr=1e-6", "train.epochs=1"]
TOLERANCE = 5e-3  # of losses of about 8, over 10 steps


TRACKED = [*OPTIONS, "tracking.enabled=true"]  # the journal then has the loss of every step


def losses(folder: Path) -> list[float]:
    """The loss of every step, from the run's journal."""
    records = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    values = [record["values"] for record in records if record["kind"] == "metrics"]
    return [v["train/loss"] for v in values if "train/loss" in v]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One MLflow store for all runs: to make one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield


@pytest.fixture(scope="module")
def ddp(
    faces: ShardSet, store: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], float]:
    """Losses and accuracy of DDP on one rank, to which all are compared."""
    folder = tmp_path_factory.mktemp("ddp")
    config = folder / "ddp.yaml"
    config.write_text(TINY.format(shards=faces.root, output=folder / "run"))
    metrics = single(config, *TRACKED)
    return losses(folder / "run"), metrics["accuracy"]


def single(config: Path, *overrides: str) -> dict[str, float]:
    return story.main(load_config(config, overrides)).metrics


def deepspeed(stage: int) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}"]


def close(found: list[float], expected: list[float]) -> bool:
    assert len(found) == len(expected) == 10
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) < TOLERANCE


def test_every_stage_equals_ddp(
    tiny: Write, tmp_path: Path, ddp: tuple[list[float], float]
) -> None:
    for stage in (0, 1, 2, 3):
        found = single(tiny(f"zero{stage}"), *TRACKED, *deepspeed(stage))
        assert close(losses(tmp_path / f"zero{stage}"), ddp[0]), stage
        assert found["accuracy"] == ddp[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_ddp(
    tiny: Write, tmp_path: Path, ddp: tuple[list[float], float], stage: int
) -> None:
    if stage == 1:  # by DeepSpeed's own launcher, whose default port is taken now and then
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = Path(sys.executable).with_name("deepspeed")
        done = run(launcher, "--num_accelerators", "2", "--master_port", str(port),
                   REPOSITORY / "launch" / "train.py", tiny("two"), *TRACKED,
                   cwd=tmp_path, timeout_s=120)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        train(2, tiny("two"), *TRACKED, *deepspeed(stage), cwd=tmp_path)
    assert close(losses(tmp_path / "two"), ddp[0])
    accuracy = torch.load(tmp_path / "two" / "best.pt", weights_only=True)["metrics"]["accuracy"]
    assert accuracy == ddp[1]


def test_a_run_goes_on_at_another_stage_world_size_and_engine(tiny: Write, tmp_path: Path) -> None:
    """DDP, then ZeRO 2 on two ranks, then ZeRO 1 alone, then DDP again."""
    single(tiny("whole"), *OPTIONS)
    single(tiny("parts"), *OPTIONS, "train.max_steps=3")
    out = train(2, tiny("parts"), *OPTIONS, *deepspeed(2), "train.max_steps=5", cwd=tmp_path)
    assert "resumed after step 3" in out
    single(tiny("parts"), *OPTIONS, *deepspeed(1), "train.max_steps=8")
    single(tiny("parts"), *OPTIONS)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert largest_difference(whole, parts, only="weight") < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(tiny: Write, tmp_path: Path, stage: int) -> None:
    options = [*DAN, "optim.name=adam", "optim.lr=1e-3", *deepspeed(stage), "train.epochs=1"]
    whole = single(tiny("whole"), *options)
    single(tiny("parts"), *options, "train.max_steps=7")
    assert single(tiny("parts"), *options) == whole
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0


@pytest.mark.parametrize("options", [["train.micro_batch=4"], ["optim.clip_norm=0.5"]])
def test_a_large_step_is_the_same(tiny: Write, tmp_path: Path, options: list[str]) -> None:
    """Momentum, accumulated and clipped gradients: their size shows in plain SGD's weights."""
    options = [*options, "optim.momentum=0.9", "optim.lr=0.1", "train.max_steps=1"]
    single(tiny("start"), "train.max_steps=1", "optim.lr=1e-30")
    single(tiny("ddp"), *options)
    expected = weights(tmp_path / "ddp")
    moved = largest_difference(weights(tmp_path / "start"), expected, only="weight")
    for stage in (0, 2, 3):
        single(tiny(f"zero{stage}"), *options, *deepspeed(stage))
        found = weights(tmp_path / f"zero{stage}")
        assert largest_difference(expected, found, only="weight") < 1e-4 * moved
        assert largest_difference(expected, found, only="momentum_buffer") < 1e-3


def test_configurations_that_cannot_be(tiny: Write) -> None:
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        with pytest.raises(ValueError, match=rf"engine\.deepspeed\.{key}: train\.global_batch"):
            single(tiny("run"), *deepspeed(1), f"engine.deepspeed.{key}=4")
    with pytest.raises(ValueError, match=r"DeepSpeed refuses its configuration"):
        single(tiny("run"), *deepspeed(1), "engine.deepspeed.zero_optimization.stage=9")
    with pytest.raises(ValueError, match=r"float64 needs engine\.name=ddp"):
        single(tiny("run"), *deepspeed(1), "train.precision=float64")
