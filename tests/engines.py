"""What tests/test_deepspeed.py runs on two ranks: DDP and every ZeRO stage."""

import shutil
from pathlib import Path
from typing import Any

import torch

from dan_dist import build as parts
from dan_dist import train as story
from dan_dist.config import EngineChoice, Optim, load_config
from dan_dist.data.loader import Batch
from dan_dist.distributed.heartbeat import session
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions, StepResult
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.run.checkpoint import to_cpu
from dan_dist.run.signals import StopRequest

GLOBAL_BATCH, CLASSES = 7, 7  # unequal shares, and weights that do not divide by two
STAGES = (0, 1, 2, 3)
LR = {"sgd": 0.01, "adam": 1e-3}
State = dict[str, Any]


class ContiguousDDP(Engine):
    """DDP with the weights laid out in memory as DeepSpeed lays them: sums have the same order."""

    def _wrap(self) -> torch.nn.Module:
        wrapped = super()._wrap()
        self.objective.to(memory_format=torch.contiguous_format)
        return wrapped


def build(
    world: World, stage: int | None, optimizer: str, *, clip_norm: float | None = 1.0,
    may_skip: bool = False, compiled: bool = False, extra: dict[str, Any] | None = None,
) -> Engine:  # fmt: skip
    """A fresh engine, always with the same weights; stage None: DDP."""
    torch.manual_seed(0)
    objective = Objective(DAN(CLASSES, 2, width=16), CLASSES, fcn="affinity", afn="partition")
    optim = Optim.model_validate(
        {"name": optimizer, "lr": LR[optimizer], "momentum": 0.9, "clip_norm": clip_norm}
    )
    options = StepOptions(
        global_batch=GLOBAL_BATCH, micro_batch=4 // world.size, may_skip=may_skip, compile=compiled
    )
    if stage is None:
        return ContiguousDDP(objective, world, optim, options)
    from dan_dist.engine.deepspeed import DeepSpeedEngine

    choice = EngineChoice(name="deepspeed", zero_stage=stage, deepspeed=extra or {})
    return DeepSpeedEngine(objective, world, optim, options, choice)


def step(engine: Engine, number: int, *, poison: float = 0.0) -> StepResult:
    """One step on this rank's part of the batch of that number; `poison` is added to it."""
    random = torch.Generator().manual_seed(number)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=random) + poison
    labels = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=random)
    ranks, own = engine.world.size, engine.world.rank
    part = slice(own * GLOBAL_BATCH // ranks, (own + 1) * GLOBAL_BATCH // ranks)
    lr = engine.optimizer.param_groups[0]["lr"]
    batch = Batch(images[part], labels[part], torch.arange(GLOBAL_BATCH)[part])
    return engine.train_step(batch, lr=lr, flags=StepFlags(False, False, 0))


def distance(a: State, b: State) -> float:
    """Between all weights and centres, as points in space."""
    names = [k for k in b["objective"] if k.endswith(("weight", "bias", "centers"))]
    squares = [(a["objective"][k] - b["objective"][k]).double().square().sum() for k in names]
    return float(torch.stack(squares).sum().sqrt())


def single_steps(world: World) -> dict[str, dict[str, float]]:
    """How far a stage's first step is from DDP's: accumulated, clipped, unequal shares.

    The weights' distance is in parts of DDP's step, the norm's a ratio.
    """
    found = {}
    for optimizer in LR:
        ddp = build(world, None, optimizer)
        start, norm, expected = to_cpu(ddp.state()), step(ddp, 0).grad_norm, to_cpu(ddp.state())
        for stage in STAGES:
            engine = build(world, stage, optimizer)
            ratio = float(step(engine, 0).grad_norm / norm)
            state = engine.state()
            if world.is_main:
                weights = distance(state, expected) / distance(start, expected)
                found[f"{optimizer}, stage {stage}"] = {"weights": weights, "norm": ratio}
    return found


def train_all(folder: Path, config: Path, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Each engine from the start to step 3, then each from where another one stopped to step 5.

    Leaves their runs in FOLDER/ddp, 0 …, 0-ddp …; returns how far single steps are apart.
    """
    vars(parts)["Engine"] = ContiguousDDP
    with session("cpu", timeout_s=60, on_loss=print) as (world, heart):

        def run(name: str, engine: str, steps: int) -> None:
            options = [*overrides, f"train.output={folder / name}", f"train.max_steps={steps}"]
            if engine != "ddp":
                options += ["engine.name=deepspeed", f"engine.zero_stage={engine}"]
            story.run(load_config(config, options), world, StopRequest(), heart)

        engines = ["ddp", *map(str, STAGES)]
        pairs = list(zip([*engines[1:], engines[0]], engines, strict=True))
        for engine in engines:
            run(engine, engine, 3)
        if world.is_main:
            for before, engine in pairs:
                shutil.copytree(folder / before, folder / f"{before}-{engine}")
        torch.distributed.barrier()
        for before, engine in pairs:
            run(f"{before}-{engine}", engine, 5)
        run("ddp", "ddp", 5)
        return single_steps(world)
