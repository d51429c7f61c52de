"""Compiled and captured steps: when they are chosen, that they train the same, how they fall back.

The compiler is rehearsed up to the operations that it would generate code for.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from conftest import ALONE, copied, single
from dan_dist import build as parts
from dan_dist import train as story
from dan_dist.build import build_engine
from dan_dist.config import Optim, load_config
from dan_dist.data.loader import Batch
from dan_dist.distributed.world import World, close_world, init_world
from dan_dist.engine import compile as compiling
from dan_dist.engine.compile import choose_compilation, describe, keep_compiled_code
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.engine.graph import WARM_STEPS
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path

Write = Callable[[str], Path]
FLAGS = StepFlags(stop=False, save=False, replaced=0)
REHEARSED = "aot_eager_decomp_partition"  # inductor's operations, without its code
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(compiling, "BACKEND", REHEARSED)
    yield
    torch._dynamo.reset()


def engine(world: World = ALONE, heads: int = 0, **options: Any) -> Engine:
    torch.manual_seed(0)
    values = {"global_batch": 7, "precision": "float64", **options}
    objective = Objective(DAN(7, heads, width=16), 7, fcn="affinity" if heads else "none")
    return Engine(objective, world, Optim(name="sgd", ema=0.9), StepOptions(**values))


def batch(number: int, own: slice = slice(None)) -> Batch:
    random = torch.Generator().manual_seed(number)
    images = torch.randn(7, 32, 32, 3, generator=random).permute(0, 3, 1, 2)
    return Batch(images[own], torch.arange(7)[own], torch.arange(7)[own])


def train(found: Engine, own: slice = slice(None), steps: int = 3) -> Tensor:
    """Losses and gradient norms of a few steps."""
    rows = []
    for number in range(steps):
        result = found.train_step(batch(number, own), lr=1e-2, flags=FLAGS)
        rows.append(torch.cat([result.losses, result.grad_norm[None]]))
    return torch.stack(rows) if rows else torch.empty(0)


@pytest.mark.parametrize(
    ("choice", "device", "steps", "prevented", "compile", "capture"),
    [
        ("auto", CUDA, 44_920, "", True, True),
        ("auto", CUDA, 900, "", False, True),
        ("auto", CUDA, 900, "why", False, False),
        ("auto", CPU, 44_920, "", False, False),
        (True, CPU, 1, "", True, False),
        (True, CUDA, 1, "", True, True),
        (True, CUDA, 1, "why", True, False),
        (False, CUDA, 44_920, "", False, False),
    ],
)
def test_the_device_and_the_length_of_the_run_decide(
    choice: Any, device: Any, steps: int, prevented: str, compile: bool, capture: bool
) -> None:
    chosen = choose_compilation(choice, device, steps=steps, prevented=prevented)
    assert (chosen.compile, chosen.capture) == (compile, capture)
    line = describe(chosen)
    assert "\n" not in line and ("no CUDA graph: why" in line) == bool(prevented)


def test_the_choice_is_one_line() -> None:
    assert describe(choose_compilation("auto", CUDA, steps=900)) == (
        "step: not compiled, one CUDA graph (train.compile is auto, 900 steps, fewer than the "
        "10000 that pay for compiling)"
    )


@pytest.mark.parametrize(
    ("world", "options", "line"),
    [
        (World(0, 0, 1, 1, CPU), [], "step: not compiled (train.compile is auto: not on a cpu)"),
        (World(1, 1, 2, 2, CUDA), [], "no CUDA graph: with 2 ranks by train.compile=true alone)"),
        (World(0, 0, 1, 1, CUDA), ["train.max_skipped_steps=1"], "waits for each step's loss)"),
        (World(0, 0, 1, 1, CUDA), ["engine.name=deepspeed"], "not under engine.name=deepspeed)"),
    ],
)
def test_an_automatic_choice_is_always_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, world: World,
    options: list[str], line: str,
) -> None:  # fmt: skip
    class HereError(Exception):
        pass

    def stop(*_: object) -> None:
        raise HereError

    monkeypatch.setattr(parts, "resolve_precision", stop)  # before a device is asked for
    config = load_config("configs/demo.yaml", ["train.compile=auto", *options])
    caplog.set_level(logging.INFO)
    with pytest.raises(HereError):
        build_engine(config, world, engine().objective, steps=9)
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(line)


def test_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled_code()
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(tmp_path / "dan_dist" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled_code()
    assert cache_dir() == "/elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "micro_batch", "steps"), [(2, None, 1), (0, 4, 1)])
def test_a_compiled_objective_trains_the_same(
    rehearsed: None, heads: int, micro_batch: int | None, steps: int
) -> None:
    """In float64: losses and gradient norms of DAN's first step, of the baseline's with others."""
    plain, ours = (
        train(engine(heads=heads, compile=c, micro_batch=micro_batch), steps=steps)
        for c in (False, True)
    )
    assert torch.allclose(ours, plain, rtol=1e-9)


def compiled_on_two() -> list[list[float]]:
    """Of two ranks with 3 and 4 images: losses and norms of compiled steps under DDP."""
    compiling.BACKEND = REHEARSED
    world = init_world("cpu")
    found = train(engine(world, compile=True), [slice(0, 3), slice(3, 7)][world.rank])
    close_world(world)
    rows: list[list[float]] = found.tolist()
    return rows


@pytest.mark.slow
def test_two_compiled_ranks_equal_one() -> None:
    expected = train(engine())
    for rows in ranks(2, compiled_on_two):
        assert torch.allclose(torch.tensor(rows, dtype=torch.float64), expected, rtol=1e-9)


def rank_1_cannot() -> tuple[bool, list[list[float]]]:
    """As `compiled_on_two`, where one rank's compiler fails; and whether a step is compiled."""
    broken = os.environ["RANK"] == "1"
    compiling.BACKEND = no_compiler if broken else "eager"  # type: ignore[assignment]
    world = init_world("cpu")
    ours = engine(world, compile=True)
    ours.warm_up(32)
    found = train(ours, [slice(0, 3), slice(3, 7)][world.rank], steps=1)
    close_world(world)
    return ours.compiled is not None, found.tolist()


@pytest.mark.slow
def test_where_one_rank_cannot_compile_none_does() -> None:
    expected = train(engine(), steps=1)
    for is_compiled, rows in ranks(2, rank_1_cannot):
        assert not is_compiled
        assert torch.allclose(torch.tensor(rows, dtype=torch.float64), expected, rtol=1e-9)


@pytest.mark.slow
def test_compiled_runs_resume_in_mid_epoch(
    rehearsed: None, tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = ["train.compile=true", "train.max_steps=9", "train.checkpoint_every=5"]
    single(tiny("whole"), *options)
    step_path(copied(tmp_path / "whole", tmp_path / "parts"), 9).unlink()
    single(tiny("parts"), *options)
    assert "resumed after step 5" in caplog.text
    whole, parts = (checkpoint.load(step_path(tmp_path / n, 9)) for n in ("whole", "parts"))
    for name, tensor in whole["objective"].items():
        assert torch.equal(tensor, parts["objective"][name]), name


def no_compiler(*_: object) -> Any:
    raise RuntimeError("no compiler here\nand more")


@pytest.mark.parametrize("part", ["all", pytest.param("backward", marks=pytest.mark.slow)])
def test_where_it_cannot_be_compiled_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    half = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=no_compiler)
    monkeypatch.setattr(compiling, "BACKEND", no_compiler if part == "all" else half)
    expected = train(engine())
    ours = engine(compile=True)
    ours.warm_up(32)
    assert ours.compiled is None and torch.equal(train(ours), expected)
    said = [r for r in caplog.records if r.name.startswith("dan_dist")]
    assert [r.levelno for r in said] == [logging.WARNING]
    assert said[0].getMessage() == (
        "train.compile: not possible here (RuntimeError: no compiler here); going on without"
    )
    torch._dynamo.reset()


@pytest.mark.slow
def test_what_was_rehearsed_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two passes of a step, 4 and 3 images; and the rehearsal runs nothing."""
    compiled: list[int] = []
    runs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        number = len(compiled)
        compiled.append(number)

        def run(*own: Any) -> Any:
            runs.append(number)
            return graph.forward(*own)

        return run

    monkeypatch.setattr(compiling, "BACKEND", counting)
    ours = engine(compile=True, micro_batch=4)
    ours._compile(*ours._random_batch(32))
    assert (compiled, runs) == ([0, 1], [])
    train(ours, steps=2)
    assert (compiled, runs) == ([0, 1], [0, 1, 0, 1])
    torch._dynamo.reset()


class Rehearsal:
    """Notes what a recorder is asked for, and runs it at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def warm_up(self, work: Callable[[], object]) -> None:
        self.calls.append("warm up")
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        self.calls.append("record")
        work()

        def replay() -> None:
            self.calls.append("replay")
            work()

        return replay


def everything(found: Engine) -> list[Tensor]:
    return [t.detach().clone() for t in found._changed()]


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 2])
def test_a_captured_step_begins_where_it_was(before: int) -> None:
    """Recording leaves weights, statistics, average, optimiser and random numbers as they were."""
    ours, plain = (engine(precision="float32", capture=True) for _ in range(2))
    for found in (ours, plain):
        train(found, steps=before)
    kept, random = everything(ours), torch.get_rng_state()
    steps, step = [], ours._step

    def counted(*inputs: Any) -> Any:
        steps.append(len(recorder.calls))
        return step(*inputs)

    ours._step = counted  # type: ignore[method-assign]
    recorder = Rehearsal()
    ours.warm_up(32, recorder)
    assert recorder.calls == ["warm up", "record"]
    assert steps == [1] * WARM_STEPS + [2]
    assert torch.equal(torch.get_rng_state(), random)
    now = everything(ours)
    momenta = now[len(kept) :]  # which a fresh optimiser has none of
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=False))
    assert bool(momenta) == (not before) and not any(m.any() for m in momenta)
    assert torch.equal(train(ours), train(plain))
    assert recorder.calls[2:] == ["replay"] * 3


def test_results_of_a_captured_step_outlive_the_next() -> None:
    ours = engine(precision="float32", capture=True)
    ours.warm_up(32, Rehearsal())
    first = ours.train_step(batch(0), lr=1e-2, flags=StepFlags(True, False, 2))
    kept = first.losses.clone()
    ours.train_step(batch(1), lr=1e-2, flags=FLAGS)
    assert torch.equal(first.losses, kept)
    assert first.flags.tolist() == [1, 0, 2]


def test_where_nothing_can_be_captured_steps_are_launched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing(Rehearsal):
        def record(self, work: Callable[[], object]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    ours, plain = engine(precision="float32", capture=True), engine(precision="float32")
    ours.warm_up(32, Refusing())
    assert ours.graph is None and len(caplog.records) == 1
    assert caplog.messages[0].endswith(
        "no CUDA graph here (operation not permitted when stream is capturing); going on without"
    )
    assert torch.equal(train(ours), train(plain))


def test_loading_a_state_gives_the_captured_step_up() -> None:
    ours = engine(precision="float32", capture=True)
    ours.warm_up(32, Rehearsal())
    assert ours.graph is not None
    ours.load_state(ours.state())
    assert ours.graph is None


def test_a_step_is_recorded_before_the_loader_opens(
    tiny: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loader's buffers free would end a capture under way."""
    calls, open_loader = [], story.open_train_loader

    def opened(*arguments: Any, **options: Any) -> Any:
        calls.append("loader")
        return open_loader(*arguments, **options)

    monkeypatch.setattr(Engine, "warm_up", lambda self, size: calls.append(f"warm up {size}"))
    monkeypatch.setattr(story, "open_train_loader", opened)
    single(tiny("run"), "train.max_steps=1")
    assert calls == ["warm up 32", "loader"]
