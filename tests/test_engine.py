"""The step that trains beside the plainest form of it: fast is not something else."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from conftest import ALONE
from dan_dist.config import Optim
from dan_dist.data.loader import Batch
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.engine.precision import Precision, resolve_precision
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective

CPU = torch.device("cpu")
LR = 1e-3
BATCH = 16


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads share out sums, and bfloat16 rounds those of one thread further off."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def objective() -> Objective:
    torch.manual_seed(0)
    return Objective(DAN(8, 2), 8)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 64, 64, 3, generator=generator).permute(0, 3, 1, 2)
    return Batch(images, torch.arange(BATCH) % 8, torch.arange(BATCH))


def plain_step(model: Objective) -> tuple[Tensor, Tensor]:
    """Loss and weights after a step of SGD in float64, as a textbook writes it."""
    model = copy.deepcopy(model).double()
    images, labels, _ = batch()
    loss = model(images.double().contiguous(), labels, BATCH)
    loss.total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
    return loss.parts, flat(model)


def flat(model: Objective) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("precision", "loss_within", "update_within"),
    [("float64", 1e-12, 1e-9), ("float32", 1e-4, 0.05), ("bf16", 0.02, 1.0)],
)
def test_a_step_is_the_plain_one(
    precision: Precision, loss_within: float, update_within: float
) -> None:
    """update_within: of the update's length. From a random start bfloat16 rounds that away."""
    start = objective()
    parts, after = plain_step(start)
    engine = Engine(
        copy.deepcopy(start),
        ALONE,
        Optim(name="sgd", lr=LR, momentum=0.0),
        StepOptions(global_batch=BATCH, precision=precision),
    )
    result = engine.train_step(batch(), lr=LR, flags=StepFlags(False, False, 0))
    assert torch.allclose(result.losses.double(), parts, rtol=loss_within, atol=0)
    update = after - flat(start)
    distance = (flat(engine.objective) - after).norm() / update.norm()
    assert distance < update_within, distance


def test_auto_takes_bfloat16_where_a_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert resolve_precision("auto", CPU) == expected
        assert resolve_precision("float64", CPU) == "float64"
