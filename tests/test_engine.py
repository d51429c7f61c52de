"""The step that trains beside the plainest form of it: fast is not something else."""

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import ALONE
from dan_dist.config import Optim
from dan_dist.data.loader import Batch
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.engine.passes import micro_steps, pass_images, pass_layout
from dan_dist.engine.precision import Precision, resolve_precision
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective

CPU = torch.device("cpu")
LR = 1e-3
BATCH = 16


def objective() -> Objective:
    torch.manual_seed(0)
    return Objective(DAN(8, 2, width=16), 8)


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


def bf16_noise(model: Objective) -> Tensor:
    """(4,) root mean squares of what the losses change by when a network's operations round.

    Each result of a layer is off by up to bfloat16's unit in the last place, at random: how a
    machine multiplies, and in which order it adds, decides which way.
    """
    images, labels, _ = batch()
    images = images.double().contiguous()

    def losses(seed: int, unit: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def off(_: nn.Module, __: object, result: Tensor) -> Tensor:
            random = torch.rand(result.shape, generator=generator, dtype=torch.float64)
            return result * (1 + unit * (2 * random - 1))

        rounded = copy.deepcopy(model).double()
        for module in rounded.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.register_forward_hook(off)
        with torch.no_grad():
            return rounded(images, labels, BATCH).parts

    exact = losses(0, 0.0)
    changes = [losses(seed, 2.0**-8) - exact for seed in range(8)]
    return torch.stack(changes).square().mean(dim=0).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "loss_within", "update_within"),
    [("float64", 1e-12, 1e-9), ("float32", 1e-4, 0.05), ("bf16", None, 1.0)],
)
def test_a_step_is_the_plain_one(
    precision: Precision, loss_within: float | None, update_within: float
) -> None:
    """loss_within: of each loss; None: five deviations of what rounding does. update_within: of the
    update's length. From a random start bfloat16 rounds that away."""
    start = objective()
    parts, after = plain_step(start)
    engine = Engine(
        copy.deepcopy(start),
        ALONE,
        Optim(name="sgd", lr=LR, momentum=0.0),
        StepOptions(global_batch=BATCH, precision=precision),
    )
    result = engine.train_step(batch(), lr=LR, flags=StepFlags(False, False, 0))
    bound = 5 * bf16_noise(start) if loss_within is None else loss_within * parts
    assert ((result.losses.double() - parts).abs() < bound).all(), (result.losses, parts, bound)
    assert bound[0] < 0.05 * parts[0]
    update = after - flat(start)
    distance = (flat(engine.objective) - after).norm() / update.norm()
    assert distance < update_within, distance


def test_auto_takes_bfloat16_where_a_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert resolve_precision("auto", CPU) == expected
        assert resolve_precision("float64", CPU) == "float64"


@pytest.mark.parametrize(
    ("device", "batch", "micro_batch", "ranks", "layout"),
    [
        ("cpu", 8, None, 1, torch.contiguous_format),
        ("cpu", 9, None, 1, torch.channels_last),
        ("cpu", 32, 8, 1, torch.contiguous_format),
        ("cpu", 17, None, 2, torch.channels_last),  # 9 images on one rank, 8 on the other
        ("cuda", 8, None, 1, torch.channels_last),
    ],
)
def test_a_passs_images_decide_the_layout_for_all_ranks(
    device: str, batch: int, micro_batch: int | None, ranks: int, layout: torch.memory_format
) -> None:
    images = pass_images(batch, micro_steps(batch, micro_batch, ranks), ranks)
    assert pass_layout(torch.device(device), images) == layout
