"""DeepSpeed's stages treat groups of parameters, and the weights' average, as DDP does."""

from typing import Any

import pytest
import torch

from dan_dist.config import EngineChoice, Optim
from dan_dist.data.loader import Batch
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.run.checkpoint import to_cpu

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
OPTIM = Optim(
    name="adamw", lr=1e-3, weight_decay=0.1, decay="weights", backbone_lr=0.5, ema=0.5,
    clip_norm=1.0,
)  # fmt: skip


class ContiguousDDP(Engine):
    """DDP with the weights laid out in memory as DeepSpeed lays them: sums have the same order."""

    def _wrap(self) -> torch.nn.Module:
        wrapped = super()._wrap()
        self.objective.to(memory_format=torch.contiguous_format)
        return wrapped


def build(stage: int | None) -> Engine:
    """stage None: DDP."""
    torch.manual_seed(0)
    objective = Objective(DAN(7, 0), 7, fcn="affinity")
    options = StepOptions(global_batch=8)
    if stage is None:
        return ContiguousDDP(objective, ALONE, OPTIM, options)
    from dan_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(objective, ALONE, OPTIM, options, EngineChoice(zero_stage=stage))


def train(engine: Engine, numbers: range) -> dict[str, Any]:
    """The state after steps on the batches of those numbers."""
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        images = torch.randn(8, 3, 32, 32, generator=random)
        batch = Batch(images, torch.arange(8) % 7, torch.arange(8))
        engine.train_step(batch, lr=1e-3, flags=StepFlags(False, False, 0))
    found: dict[str, Any] = to_cpu(engine.state())
    return found


def apart(a: Any, b: Any, path: str = "") -> list[str]:
    """Where tensors in two states are apart by more than rounding, or keys differ."""
    if torch.is_tensor(a):
        return [] if torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [w for k in a if k != "param_groups" for w in apart(a[k], b[k], f"{path}/{k}")]
    return [] if a == b else [path]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_trains_and_resumes_as_ddp(stage: int) -> None:
    ddp, ours = build(None), build(stage)
    expected, found = train(ddp, range(2)), train(ours, range(2))
    assert apart(found, expected) == []
    groups = [[(g["weight_decay"], len(g["params"])) for g in s["optimizer"]["param_groups"]]
              for s in (found, expected)]  # fmt: skip
    assert groups[0] == groups[1] and len(groups[0]) == 4
    whole = train(ddp, range(2, 4))
    for fresh, state in ((build(stage), expected), (build(None), found)):
        fresh.load_state(state)
        assert apart(train(fresh, range(2, 4)), whole) == []
