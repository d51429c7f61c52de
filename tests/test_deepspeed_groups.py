"""DeepSpeed's stages treat groups of parameters, and the weights' average, as DDP does."""

from typing import Any

import pytest
import torch
from engines import ContiguousDDP
from ranks import ranks

from conftest import ALONE
from dan_dist.config import EngineChoice, Optim
from dan_dist.data.loader import Batch
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.run.checkpoint import to_cpu

OPTIM = Optim(
    name="adamw", lr=1e-3, weight_decay=0.1, decay="weights", backbone_lr=0.5, ema=0.5,
    clip_norm=1.0,
)  # fmt: skip


def build(stage: int | None) -> Engine:
    """stage None: DDP."""
    torch.manual_seed(0)
    objective = Objective(DAN(7, 0, width=16), 7, fcn="affinity")
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


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights, average and moments, each as a point in space."""
    moments = state["optimizer"]["state"]
    named = {"objective": state["objective"], "average": state["average"]}
    for key in ("exp_avg", "exp_avg_sq"):
        named[key] = {number: moments[number][key] for number in sorted(moments)}
    return {
        name: torch.cat([v.double().flatten() for v in tensors.values() if v.is_floating_point()])
        for name, tensors in named.items()
    }


def apart(found: dict[str, Any], expected: dict[str, Any], start: dict[str, Any]) -> float:
    """How far two states are apart, in parts of the way from the start."""
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    a, b, origin = flat(found), flat(expected), flat({**expected, **start})
    begin = {name: origin[name] for name in ("objective", "average")}
    return max(float((a[k] - b[k]).norm() / (b[k] - begin.get(k, 0.0)).norm()) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_trains_and_resumes_as_ddp(stage: int) -> None:
    ranks(1, compare, stage)


def compare(stage: int) -> None:
    """Two steps, and two more from each other's states, of a stage and of DDP."""
    ddp, ours = build(None), build(stage)
    start = {k: to_cpu(ddp.state())[k] for k in ("objective", "average")}
    expected, found = train(ddp, range(2)), train(ours, range(2))
    assert apart(found, expected, start) < 1e-3
    groups = [[(g["weight_decay"], len(g["params"])) for g in s["optimizer"]["param_groups"]]
              for s in (found, expected)]  # fmt: skip
    assert groups[0] == groups[1] and len(groups[0]) == 4
    whole = train(ddp, range(2, 4))
    for fresh, state in ((build(stage), expected), (build(None), found)):
        fresh.load_state(state)
        assert apart(train(fresh, range(2, 4)), whole, start) < 1e-2
