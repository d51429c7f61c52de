"""DDP and DeepSpeed's engines side by side on the ranks of torchrun: tests/test_deepspeed.py's hands.

    torchrun --nproc-per-node=2 tests/engines.py FOLDER

Writes into FOLDER what the tests look at.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dan_dist.checkpoint import to_cpu
from dan_dist.data import Batch
from dan_dist.engine import Engine, StepResult, Votes
from dan_dist.losses import Objective
from dan_dist.model import DAN
from dan_dist.world import World, close_world, init_world

GLOBAL_BATCH, CLASSES, STEPS = 7, 7, 3  # unequal shares, and weights that do not divide by two
LR = {"sgd": 0.01, "adam": 1e-3}
State = dict[str, Any]


class ContiguousDDP(Engine):
    """DDP with its weights laid out in memory as DeepSpeed lays them: sums have the same order."""

    def _wrap(self) -> torch.nn.Module:
        wrapped = super()._wrap()
        self.objective.to(memory_format=torch.contiguous_format)
        return wrapped


def build(world: World, stage: int | None, optimizer: str, **changes: Any) -> Engine:
    """A fresh engine, always with the same weights; stage None: DDP."""
    torch.manual_seed(0)
    objective = Objective(DAN(CLASSES, 2), CLASSES, fcn="affinity", afn="partition")
    options: dict[str, Any] = {
        "optimizer": optimizer, "lr": LR[optimizer], "momentum": 0.9, "weight_decay": 0.0,
        "precision": "float32", "sync_bn": True, "compile": False, "global_batch": GLOBAL_BATCH,
        "micro_batch": 2, "may_skip": False, "clip_norm": 1.0, **changes,
    }  # fmt: skip
    if stage is None:
        options.pop("extra", None)
        return ContiguousDDP(objective, world, **options)
    from dan_dist.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(objective, world, zero_stage=stage, **{"extra": {}, **options})


def step(engine: Engine, number: int, *, poison: float = 0.0) -> StepResult:
    """One step on this rank's part of the batch of that number; `poison` is added to it."""
    random = torch.Generator().manual_seed(number)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=random) + poison
    labels = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=random)
    ranks, own = engine.world.size, engine.world.rank
    part = slice(own * GLOBAL_BATCH // ranks, (own + 1) * GLOBAL_BATCH // ranks)
    lr = engine.optimizer.param_groups[0]["lr"]
    batch = Batch(images[part], labels[part], torch.arange(GLOBAL_BATCH)[part])
    return engine.train_step(batch, lr=lr, votes=Votes(False, False, 0))


def distance(a: State, b: State) -> float:
    """The largest difference of weights, centres and statistics."""
    pairs = ((a["objective"][k].double(), b["objective"][k].double()) for k in b["objective"])
    return max((x - y).abs().max().item() for x, y in pairs)
