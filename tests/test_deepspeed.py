"""Training under DeepSpeed equals training under DDP, and each resumes where the other stopped.

Most is bit for bit, at real learning rates: on the baseline network (DAN itself is chaotic, and
makes much of a last bit), with DDP's weights laid out in memory as DeepSpeed lays them. Each test
trains in processes of its own: DeepSpeed gives no memory back.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import STAGES, ContiguousDDP, build, distance, single_steps, step, train_all
from ranks import free_port, ranks

from conftest import ALONE, SCRIPT, TINY, run, shared, torchrun
from dan_dist import build as parts
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.distributed.world import init_world
from dan_dist.engine import compile as compiling
from dan_dist.run import checkpoint
from dan_dist.run.checkpoint import to_cpu
from dan_dist.run.folder import step_path
from shards.format import ShardSet

Write = Callable[[str], Path]
OPTIONS = ["optim.name=adam", "optim.lr=1e-3", "train.precision=float32"]


def deepspeed(stage: int) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}"]


def learned(folder: Path, steps: int) -> dict[str, Any]:
    """What a checkpoint holds of weights and optimiser, and how good they are."""
    content = checkpoint.load(step_path(folder, steps))
    return {key: content[key] for key in ("objective", "optimizer", "metrics", "step")}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit; of the optimiser's settings, DDP's say more."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "param_groups")
    return bool(a == b)


@pytest.fixture(scope="session")
def two(faces: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of tests/engines.py on two ranks."""

    def make(folder: Path) -> None:
        folder.mkdir()
        config = folder / "tiny.yaml"
        config.write_text(TINY.format(shards=faces.root, output=folder / "unused"))
        steps, _ = ranks(2, train_all, folder, config, OPTIONS, timeout_s=240)
        (folder / "steps.json").write_text(json.dumps(steps))

    return shared(tmp_path_factory, "two", make)


@pytest.mark.slow
def test_two_ranks_equal_ddp(two: Path) -> None:
    """Weights, moments, statistics and validation after three steps."""
    expected = learned(two / "ddp", 3)
    assert set(expected["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    for stage in STAGES:
        assert same(learned(two / str(stage), 3), expected), stage


@pytest.mark.slow
def test_each_goes_on_where_another_stopped(two: Path) -> None:
    for pair in ("0-ddp", "1-0", "2-1", "3-2", "ddp-3"):
        assert same(learned(two / pair, 5), learned(two / "ddp", 5)), pair


def train_contiguous(runs: list[tuple[Path, list[str]]]) -> None:
    """Trains each configuration; DDP's weights are laid out as DeepSpeed's."""
    vars(parts)["Engine"] = ContiguousDDP
    for config, options in runs:
        story.main(load_config(config, options))


@pytest.mark.slow
def test_from_two_ranks_to_one(two: Path, tiny: Write) -> None:
    runs = []
    for number, engine in enumerate([[], *map(deepspeed, STAGES)]):
        config = tiny(f"one{number}")
        shutil.copytree(two / "3", config.with_suffix(""))
        runs.append((config, [*OPTIONS, *engine, "train.max_steps=5"]))
    ranks(1, train_contiguous, runs, timeout_s=240)
    found = [learned(config.with_suffix(""), 5) for config, _ in runs]
    assert all(same(content, found[0]) for content in found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_and_clipped_steps_of_unequal_shares(two: Path, size: int) -> None:
    """A step of DAN, by SGD and by Adam. Sums in another order differ in their last bits."""
    if size == 1:
        (steps,) = ranks(1, single_steps_alone)
    else:
        steps = json.loads((two / "steps.json").read_text())
    assert len(steps) == 2 * len(STAGES)
    for name, apart in steps.items():
        assert abs(apart["norm"] - 1) < 1e-5, (name, apart)
        assert apart["weights"] < 1e-3, (name, apart)


def single_steps_alone() -> dict[str, dict[str, float]]:
    return single_steps(ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_leaves_the_next_ones_as_they_are(stage: int) -> None:
    ranks(1, skip_a_step, stage)


def skip_a_step(stage: int) -> None:
    """A step that is not finite, between two that are."""
    ddp, engine = (build(ALONE, s, "sgd", may_skip=True, clip_norm=None) for s in (None, stage))
    for number, poison in enumerate((0.0, float("nan"), 0.0)):
        before = to_cpu(engine.state()["objective"])
        expected, found = (step(e, number, poison=poison) for e in (ddp, engine))
        assert expected.skipped == found.skipped == bool(poison)
        if poison:
            assert torch.equal(engine.state()["objective"]["centers"], before["centers"])
        else:
            assert torch.allclose(found.losses, expected.losses, rtol=1e-3)
            moved = engine.state()["objective"]["centers"] - before["centers"]
            assert moved.abs().max() > 0


@pytest.mark.slow
def test_it_goes_on_without_a_compiler_and_asks_no_norm_for_its_truth() -> None:
    ranks(1, step_without_a_compiler)


class Unread(float):
    """Of a tensor on a GPU, its truth would be waited for."""

    def __bool__(self) -> bool:
        raise AssertionError("waited for")


def step_without_a_compiler() -> None:
    def missing(*_: object) -> Any:
        raise RuntimeError("no compiler here")

    compiling.BACKEND = missing  # type: ignore[assignment]
    engine = build(ALONE, 1, "sgd", compiled=True)
    engine.warm_up(32)
    assert engine.compiled is None
    engine.model.get_global_grad_norm = lambda: Unread(3.0)
    assert float(step(engine, 0).grad_norm) == 3


@pytest.mark.slow
def test_both_launchers_lead_to_the_same_training(two: Path, tiny: Write, tmp_path: Path) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    done = run(sys.executable, launcher, "--no_local_rank", "--num_accelerators", "2",
               "--master_port", str(free_port()),  # its default is taken now and then
               SCRIPT, tiny("run"), *OPTIONS, "train.max_steps=3", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = checkpoint.load(step_path(tmp_path / "run", 3))
    assert content["config"]["engine"]["name"] == "deepspeed"
    assert same(learned(tmp_path / "run", 3), learned(two / "ddp", 3))
    options = [*OPTIONS, *deepspeed(2), "train.max_steps=5"]
    done = run(*torchrun(2), SCRIPT, tiny("run"), *options, cwd=tmp_path)
    assert done.returncode == 0 and "resumed after step 3" in done.stdout, done.stderr
    assert same(learned(tmp_path / "run", 5), learned(two / "ddp", 5))


@pytest.mark.slow
def test_an_offloaded_optimiser_trains_as_well() -> None:
    ranks(1, offload_an_optimiser)


def offload_an_optimiser() -> None:
    """A step with the optimiser's state in the CPU's memory, and one without."""
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    start, states = to_cpu(build(ALONE, None, "adam").state()), []
    for extra in ({}, offload):
        engine = build(ALONE, 2, "adam", extra=extra)
        step(engine, 0)
        states.append(engine.state())
    assert distance(*states) < 1e-3 * distance(start, states[0])


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("train_batch_size=4", r"train_batch_size: train\.global_batch sets that"),
        ("zero_optimization.stage=2", r"zero_optimization\.stage: engine\.zero_stage sets that"),
        ("gradient_clipping=1.0", r"gradient_clipping: optim\.clip_norm sets that"),
        ("optimizer.type=Adam", r"optimizer: optim\.name"),
        ("bf16.enabled=true", r"bf16: train\.precision sets that"),
        ("gradient_cliping=1.0", r"no such key; did you mean 'gradient_clipping'\?"),
        ("zero_optimization.overlap_com=true", r"DeepSpeed refuses its configuration: .*overlap"),
        ("communication_data_type=int3", r"DeepSpeed refuses its configuration"),
    ],
)
def test_configurations_that_cannot_be(tiny: Write, key: str, line: str) -> None:
    config = load_config(tiny("run"), [*deepspeed(1), f"engine.deepspeed.{key}"])
    with pytest.raises(ValueError, match=line):
        story.main(config)


def test_float64_is_refused_and_the_device_is_the_trainings(
    tiny: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"float64 needs engine\.name=ddp"):
        load_config(tiny("run"), [*deepspeed(1), "train.precision=float64"])
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    init_world("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"  # the device of the training, not the machine's
