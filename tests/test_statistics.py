"""BatchNorm's running statistics where each rank keeps its own (model.sync_bn=false)."""

import pytest
import torch
from ranks import ranks

from dan_dist.config import Optim
from dan_dist.data.loader import Batch
from dan_dist.distributed.heartbeat import session
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective

Statistics = dict[str, list[float]]  # plain, as a tensor is lost with the rank that sends it


def train_and_save() -> tuple[Statistics, Statistics, Statistics]:
    """Statistics after two steps: this rank's own, a checkpoint's, and those it goes on with."""
    with session("cpu", timeout_s=60, on_loss=print) as (world, _):
        torch.manual_seed(0)
        objective = Objective(DAN(8, 0), 8, fcn="none", afn="none")
        options = StepOptions(global_batch=8, sync_bn=False)
        engine = Engine(objective, world, Optim(name="sgd", lr=0.01), options)
        generator = torch.Generator().manual_seed(world.rank)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        for _ in range(2):
            batch = Batch(images, torch.arange(4), torch.arange(4))
            engine.train_step(batch, lr=0.01, flags=StepFlags(False, False, 0))
        own, saved = running(objective.state_dict()), running(engine.state()["objective"])
        return own, saved, running(objective.state_dict())


def running(state: dict[str, torch.Tensor]) -> Statistics:
    """Those of one layer: what a rank returns has to be small."""
    own = [f"network.backbone.bn1.running_{name}" for name in ("mean", "var")]
    return {name: state[name].tolist() for name in own}


def test_a_checkpoint_holds_those_of_all_ranks() -> None:
    """Not those of rank 0; and the run resumes from the same, as one that is resumed does."""
    (own, saved, after), (other_own, other_saved, other_after) = ranks(2, train_and_save)
    assert any(own[name] != other_own[name] for name in own)
    assert saved == after == other_saved == other_after
    for name, values in saved.items():
        means = [(a + b) / 2 for a, b in zip(own[name], other_own[name], strict=True)]
        assert values == pytest.approx(means, rel=1e-5, abs=1e-7)
