"""Learning rates against closed forms, and against torch's own schedulers."""

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, StepLR

from dan_dist.config import Config, Schedule
from dan_dist.run.plan import make_plan
from dan_dist.run.schedule import LearningRate

LR, PER_EPOCH, EPOCHS = 1e-3, 7, 6
STEPS = PER_EPOCH * EPOCHS


def rates(batch: int = 256, **schedule: Any) -> list[float]:
    lr = LearningRate(LR, batch, PER_EPOCH, STEPS, Schedule(**schedule))
    return [lr(step) for step in range(1, STEPS + 1)]


def torchs(kind: Any, each: int, **options: Any) -> list[float]:
    """What a scheduler of torch's gives when it is stepped after each `each` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
    scheduler, found = kind(optimizer, **options), []
    for step in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % each == 0:
            scheduler.step()
    return found


def test_decays_are_torchs() -> None:
    assert rates() == [LR] * STEPS
    cosine = torchs(CosineAnnealingLR, 1, T_max=STEPS, eta_min=0.1 * LR)
    for found, expected in (
        (rates(gamma=0.6), torchs(ExponentialLR, PER_EPOCH, gamma=0.6)),
        (rates(name="step", gamma=0.1, every=2),
         torchs(StepLR, PER_EPOCH, step_size=2, gamma=0.1)),
        (rates(name="cosine", floor=0.1), cosine),
    ):  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_warm_up_is_a_line_to_the_whole_rate() -> None:
    for schedule in ({"warmup_steps": 14}, {"warmup_epochs": 2.0}):
        found = rates(**schedule)
        assert found[:14] == pytest.approx([LR * k / 14 for k in range(1, 15)], rel=1e-15)
        assert found[14:] == [LR] * (STEPS - 14)
    half = rates(warmup_epochs=0.5)  # four of seven steps
    assert half[2] == pytest.approx(LR * 3 / 4) and half[3] == LR


def test_cosine_begins_after_the_warm_up() -> None:
    found = rates(name="cosine", warmup_steps=10)
    expected = [(1 + math.cos(math.pi * k / 32)) / 2 * LR for k in range(STEPS - 10)]
    assert found[10:] == pytest.approx(expected, rel=1e-12)
    assert found[9] == found[10] == LR and max(found) == LR


def test_epochs_of_the_warm_up_count_for_the_other_decays() -> None:
    plain, warm = rates(gamma=0.5), rates(gamma=0.5, warmup_steps=9)
    assert warm[8:] == plain[8:]
    assert warm[7] == pytest.approx(plain[7] * 8 / 9)


@pytest.mark.parametrize(("rule", "factor"), [("fixed", 1.0), ("linear", 8.0), ("sqrt", 8**0.5)])
def test_rules_of_the_global_batch(rule: str, factor: float) -> None:
    assert rates(2048, lr_rule=rule)[0] == pytest.approx(LR * factor, rel=1e-15)
    assert rates(256, lr_rule=rule)[0] == LR
    assert rates(512, lr_rule=rule, reference_batch=64)[0] == pytest.approx(LR * factor, rel=1e-15)


def test_where_a_run_is_ended_early_changes_no_rate() -> None:
    tree = {
        "data": {"shards": "s"},
        "train": {"epochs": 6, "global_batch": 8, "output": "o"},
        "schedule": {"name": "cosine", "warmup_epochs": 1.0},
    }
    whole = make_plan(Config.model_validate(tree), images=60, start=0)
    tree["train"]["max_steps"] = 10
    short = make_plan(Config.model_validate(tree), images=60, start=3)
    assert (whole.total, short.total) == (42, 10)
    assert [short.lr(step) for step in range(1, 11)] == [whole.lr(step) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("schedule", {"every": 2}, "schedule.every: only"),
        ("schedule", {"name": "cosine", "gamma": 0.5}, "schedule.gamma: schedule.name=cosine"),
        ("schedule", {"floor": 0.1}, "schedule.floor: only"),
        ("schedule", {"warmup_steps": 3, "warmup_epochs": 1.0}, "warmup_steps is given already"),
        ("optim", {"nesterov": True}, "optim.nesterov: only optim.name=sgd"),
        ("model", {"backbone": "imagenet", "width": 32}, "model.width: imagenet's weights have 64"),
    ],
)
def test_settings_that_do_not_go_together(section: str, values: Any, line: str) -> None:
    tree = {
        "data": {"shards": "s"},
        "train": {"epochs": 1, "global_batch": 8, "output": "o"},
        section: values,
    }
    with pytest.raises(ValueError, match=line):
        Config.model_validate(tree)
