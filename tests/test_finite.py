"""Losses and gradients that are not finite: evidence, skipped steps, the limit."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import ALONE, DAN, outcome, single
from dan_dist.config import Optim
from dan_dist.data.loader import Batch
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.model import dan as networks
from dan_dist.model.losses import Objective
from shards.format import ShardSet

Write = Callable[[str], Path]


def test_a_batch_that_is_not_finite_leaves_its_evidence(
    tiny: Write, tmp_path: Path, faces: ShardSet
) -> None:
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        single(tiny("run"), "optim.lr=1e6", "loss.fcn=center", "loss.lambda_fcn=1e6")
    evidence = json.loads((tmp_path / "run" / "not-finite-rank0.json").read_text())
    assert evidence["step"] == 2 and evidence["seed"] == 0 and len(evidence["keys"]) == 8
    split = faces.split("train")
    assert evidence["keys"] == [split.key(i) for i in evidence["ids"]]
    assert outcome(tmp_path / "run")["status"] == "failed"


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], *, gradient: bool) -> None:
    """Makes the loss, or the gradient alone, NaN at these steps."""
    forward, count = Engine._forward, iter(range(1, 1000))

    def poisoned(self, images, labels):  # type: ignore[no-untyped-def]
        loss = forward(self, images, labels)
        if next(count) in steps:
            weight = next(self.objective.parameters())
            nan = weight.sum() * math.nan
            total = loss.total + (nan - nan.detach()).nan_to_num() if gradient else loss.total + nan
            return loss._replace(total=total, parts=loss.parts if gradient else loss.parts + nan)
        return loss

    monkeypatch.setattr(Engine, "_forward", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
def test_steps_that_are_not_finite_can_be_skipped_up_to_a_limit(
    tiny: Write,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gradient: bool,
) -> None:
    what = "gradient" if gradient else "loss"
    with monkeypatch.context() as patched:
        poison(patched, {3, 7}, gradient=gradient)
        ended = single(tiny("run"), *DAN, "train.max_skipped_steps=2")
        assert ended.status == "finished" and math.isfinite(ended.metrics["accuracy"])
    assert f"the {what} is not finite at step 7" in caplog.text
    assert "skipped, the 2. of at most 2" in caplog.text
    with monkeypatch.context() as patched:
        poison(patched, {3, 7}, gradient=gradient)
        with pytest.raises(FloatingPointError, match=f"{what} is not finite at step 7"):
            single(tiny("other"), *DAN, "train.max_skipped_steps=1")


def test_the_limit_is_of_the_run_and_not_of_each_start(
    tiny: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.max_skipped_steps=1", "train.epochs=3"]
    with monkeypatch.context() as patched:
        poison(patched, {3}, gradient=False)
        single(tiny("run"), *options, "train.max_steps=5")
    with monkeypatch.context() as patched:
        poison(patched, {2}, gradient=False)  # of this start, of the run the seventh
        with pytest.raises(FloatingPointError, match="loss is not finite at step 7"):
            single(tiny("run"), *options, "train.max_steps=10")


def test_a_skipped_step_leaves_nothing_behind() -> None:
    own = Engine(
        Objective(networks.DAN(8, 2), 8),
        ALONE,
        Optim(name="sgd", lr=0.1),
        StepOptions(global_batch=8, may_skip=True),
    )
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    images[0, 0, 0, 0] = math.inf
    before = {k: v.clone() for k, v in own.objective.state_dict().items()}
    flags = StepFlags(False, False, 0)
    assert own.train_step(Batch(images, labels, labels), lr=0.1, flags=flags).skipped
    for name, value in own.objective.state_dict().items():
        assert torch.equal(value, before[name]), name
