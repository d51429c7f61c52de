"""The optimiser's settings against torch's own, and what checkpoints hold of them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from conftest import ALONE, single
from conftest import DAN as DAN_OPTIONS
from dan_dist.build import build_engine
from dan_dist.config import Optim, load_config
from dan_dist.data.loader import Batch
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.engine.optimizer import load_optimizer, make_optimizer, parameter_groups
from dan_dist.engine.precision import resolve_precision
from dan_dist.evaluation import evaluate
from dan_dist.inference import explain, export, predict
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.model.weights import load_trained
from dan_dist.options import EvaluateOptions, ExplainOptions, ExportOptions, PredictOptions
from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path

Write = Callable[[str], Path]
FLAGS = StepFlags(stop=False, save=False, replaced=0)
BATCH = 8


def objective(heads: int = 0, **options: Any) -> Objective:
    torch.manual_seed(0)
    fcn = "affinity" if heads else "none"
    return Objective(DAN(7, heads, width=16), 7, fcn=fcn, **options)


def engine(optim: Optim, heads: int = 0, **options: Any) -> Engine:
    return Engine(objective(heads), ALONE, optim, StepOptions(global_batch=BATCH, **options))


def batch(number: int, poison: float = 0.0) -> Batch:
    random = torch.Generator().manual_seed(number)
    images = torch.randn(BATCH, 3, 32, 32, generator=random) + poison
    return Batch(images, torch.arange(BATCH) % 7, torch.arange(BATCH))


def weights(found: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in found.parameters()])


CASES = {
    "adam": (Optim(lr=1e-3), lambda p: torch.optim.Adam(p, 1e-3)),
    "adamw": (
        Optim(name="adamw", lr=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    ),
    "nesterov": (
        Optim(name="sgd", lr=1e-2, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 1e-2, 0.9, nesterov=True, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_optimisers_are_torchs_to_the_bit(case: str) -> None:
    optim, torchs = CASES[case]
    ours, plain = engine(optim), objective()
    other = torchs(plain.parameters())
    for number in range(3):
        ours.train_step(batch(number), lr=optim.lr, flags=FLAGS)
        other.zero_grad()
        images, labels, _ = batch(number)
        plain(images, labels, BATCH).total.backward()
        other.step()
    assert torch.equal(weights(ours.objective), weights(plain))
    state = ours.state()["optimizer"]
    assert state["param_groups"] == other.state_dict()["param_groups"]  # one group, all its keys


def test_groups_of_parameters() -> None:
    optim = Optim(weight_decay=0.1, decay="weights", backbone_lr=0.5)
    model = objective(heads=2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        (g.lr_factor, g.weight_decay): {names[id(p)] for p in g.parameters}
        for g in parameter_groups(model, optim)
    }
    assert set(found) == {(f, d) for f in (0.5, 1.0) for d in (0.0, 0.1)}
    assert "network.backbone.bn1.weight" in found[0.5, 0.0]
    assert "network.backbone.conv1.weight" in found[0.5, 0.1]
    assert {"centers", "network.classifier.bias"} <= found[1.0, 0.0]
    assert "network.classifier.weight" in found[1.0, 0.1]
    assert sum(map(len, found.values())) == len(names)


def test_a_factor_of_the_backbone_is_one_of_its_learning_rate() -> None:
    """SGD without momentum: the backbone moves a quarter as far as with the whole rate."""
    start, moved = weights(objective().network.backbone), []
    for factor in (1.0, 0.25):
        ours = engine(Optim(name="sgd", momentum=0.0, backbone_lr=factor), precision="float64")
        ours.train_step(batch(0), lr=1e-2, flags=FLAGS)
        moved.append(weights(ours.objective.network.backbone) - start)
    assert torch.allclose(moved[1], moved[0] / 4, atol=1e-15)


def test_a_frozen_backbone_stays_as_it_is() -> None:
    ours = engine(Optim(backbone_lr=0.0, clip_norm=1.0), heads=2)
    kept = {k: v.clone() for k, v in ours.objective.network.backbone.state_dict().items()}
    before = ours.objective.network.classifier.weight.clone()
    for number in range(2):
        ours.train_step(batch(number), lr=1e-2, flags=FLAGS)
    now = ours.objective.network.backbone.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in now.items())  # statistics too
    assert not torch.equal(before, ours.objective.network.classifier.weight)


def test_the_average_of_the_weights_is_its_formula() -> None:
    ours = engine(Optim(name="sgd", ema=0.75), precision="float64")
    expected = weights(ours.objective)
    for number in range(3):
        ours.train_step(batch(number), lr=1e-2, flags=FLAGS)
        expected = 0.75 * expected + 0.25 * weights(ours.objective)
    assert ours.average is not None
    tensors = ours.state()["average"]
    found = torch.cat([tensors[n].flatten() for n, _ in ours.objective.named_parameters()])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert "network.backbone.bn1.running_var" in tensors
    trained = weights(ours.objective)
    with ours.average.in_place():
        assert torch.equal(weights(ours.objective), found)
    assert torch.equal(weights(ours.objective), trained)


def test_smoothed_labels_are_a_mixture() -> None:
    """(1 − s) of the label's cross-entropy and s of the mean over all classes'."""
    images, labels, _ = batch(0)
    model = objective(label_smoothing=0.1).eval()
    found = model(images, labels, BATCH)
    logs = found.logits.log_softmax(dim=1)
    own = -logs[torch.arange(BATCH), labels]
    assert torch.allclose(found.total, (0.9 * own - 0.1 * logs.mean(dim=1)).mean())


def test_a_checkpoint_changes_machines() -> None:
    """What belongs to the kernels of one machine is not taken over from another."""
    ours = engine(Optim(lr=1e-3))
    ours.train_step(batch(0), lr=1e-3, flags=FLAGS)
    state = ours.state()["optimizer"]
    state["param_groups"][0] |= {"fused": True, "capturable": True, "lr": 7.0}
    groups = parameter_groups(objective(), Optim())
    fresh = make_optimizer(groups, Optim(lr=1e-3), fused=False, capturable=False)
    load_optimizer(fresh, state)
    (group,) = fresh.param_groups
    assert (group["fused"], group["capturable"], group["lr"]) == (None, False, 1e-3)
    moments = fresh.state_dict()["state"]
    assert torch.equal(moments[0]["exp_avg"], state["state"][0]["exp_avg"])


def test_moments_lie_in_memory_as_their_weights() -> None:
    """A GPU's fused kernels want that; few images on a CPU leave them contiguous."""
    ours = engine(Optim(lr=1e-3))
    ours.train_step(batch(0), lr=1e-3, flags=FLAGS)
    assert ours.objective.network.backbone.conv1.weight.is_contiguous()
    other = objective().to(memory_format=torch.channels_last)
    groups = parameter_groups(other, Optim())
    fresh = make_optimizer(groups, Optim(lr=1e-3), fused=True, capturable=False)
    load_optimizer(fresh, ours.state()["optimizer"])
    for parameter, own in zip(groups[0].parameters, ours.groups[0].parameters, strict=True):
        moment = fresh.state[parameter]["exp_avg"]
        assert moment.stride() == parameter.stride()
        assert torch.equal(moment, ours.optimizer.state[own]["exp_avg"])


LARGE = [
    *DAN_OPTIONS, "optim.name=adamw", "optim.weight_decay=0.1", "optim.decay=weights",
    "optim.backbone_lr=0.5", "optim.ema=0.5", "loss.label_smoothing=0.1", "schedule.gamma=1.0",
    "schedule.name=cosine", "schedule.warmup_steps=12", "schedule.lr_rule=sqrt",
    "schedule.reference_batch=2", "optim.lr=1e-3",
]  # fmt: skip


@pytest.mark.slow
def test_resumed_in_mid_warm_up_equals_uninterrupted(tiny: Write, tmp_path: Path) -> None:
    """To the bit, with everything switched on; and the average is found by its name."""
    single(tiny("whole"), *LARGE)
    single(tiny("parts"), *LARGE, "train.max_steps=7")
    single(tiny("parts"), *LARGE)
    contents = [checkpoint.load(step_path(tmp_path / n, 20)) for n in ("whole", "parts")]
    whole, parts = contents
    for key in ("objective", "average"):
        assert all(torch.equal(v, parts[key][k]) for k, v in whole[key].items()), key
    assert len(whole["optimizer"]["param_groups"]) == 4
    assert whole["metrics"] == parts["metrics"]
    best = load_config(tiny("whole"), LARGE)
    assert best.optim.ema == 0.5
    path = tmp_path / "whole" / "best.pt"
    both = [load_trained(path, weights=w).network.state_dict() for w in ("average", "trained")]
    name = "classifier.weight"
    assert not torch.equal(both[0][name], both[1][name])
    assert torch.equal(load_trained(path).network.state_dict()[name], both[0][name])
    with pytest.raises(ValueError, match=r"train\.epochs was 2, is 3"):
        single(tiny("whole"), *LARGE, "train.epochs=3")  # its cosine would be another


@pytest.mark.parametrize("weights", ["average", "trained"])
def test_programs_take_the_weights_that_are_named(
    weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ask(*_: object, weights: str, **__: object) -> NoReturn:
        raise LookupError(weights)

    asked: Any = {"checkpoint": tmp_path / "x.pt", "weights": weights}
    for module, options in (
        (evaluate, EvaluateOptions(data="x", device="cpu", **asked)),
        (predict, PredictOptions(images=(tmp_path,), device="cpu", **asked)),
        (explain, ExplainOptions(data="x", device="cpu", **asked)),
        (export, ExportOptions(**asked)),
    ):
        monkeypatch.setattr(module, "load_trained", ask)
        with pytest.raises(LookupError, match=f"^{weights}$"):
            module.main(options)


def test_a_checkpoint_without_an_average_has_none_to_give(tiny: Write, tmp_path: Path) -> None:
    single(tiny("run"), "train.max_steps=1")
    path = tmp_path / "run" / "step-00000001.pt"
    assert "average" not in checkpoint.read(path)
    with pytest.raises(ValueError, match="holds no average of the weights"):
        load_trained(path, weights="average")


def test_scaled_losses_leave_steps_out_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient too large for float16 is no error: the weights stay and the scale is halved."""
    ours = engine(Optim(lr=1e-3), precision="fp16")
    ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 2.0**40})
    start = weights(ours.objective)
    result = ours.train_step(batch(0), lr=1e-3, flags=FLAGS)
    assert torch.equal(weights(ours.objective), start)
    assert result.grad_norm == 0 and result.losses.isfinite().all() and not result.skipped
    assert ours.state()["scaler"]["scale"] == 2.0**39
    ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 2.0**8})
    exact = engine(Optim(lr=1e-3)).train_step(batch(0), lr=1e-3, flags=FLAGS)
    found = ours.train_step(batch(0), lr=1e-3, flags=FLAGS)
    assert not torch.equal(weights(ours.objective), start)
    assert found.losses[0] == pytest.approx(float(exact.losses[0]), rel=2e-2)
    assert found.grad_norm > 0 and found.grad_norm.isfinite()


def test_a_gradient_that_no_scale_helps_is_an_error() -> None:
    ours = engine(Optim(lr=1e-3), precision="fp16")
    ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 0.5})
    result = ours.train_step(batch(0, poison=float("nan")), lr=1e-3, flags=FLAGS)
    assert not result.grad_norm.isfinite()


@pytest.mark.parametrize(
    ("native", "by", "expected"),
    [
        (True, "ddp", "bf16"),
        (False, "ddp", "fp16"),
        (True, "deepspeed", "bf16"),
        (False, "deepspeed", "float32"),  # which scales no losses here
    ],
)
def test_auto_takes_what_a_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, native: bool, by: str, expected: str
) -> None:
    asked = []

    def is_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert resolve_precision("auto", torch.device("cuda"), by) == expected
    assert asked == [False]  # cards before Ampere emulate it


def full(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 …")


@pytest.mark.parametrize(
    ("micro_batch", "images", "way"),
    [
        (4, 4, "give train.micro_batch=2 or less"),
        (2, 2, "or train with a smaller model.image_size or model.heads"),  # BatchNorm needs two
    ],
)
def test_a_step_without_memory_names_the_key(
    monkeypatch: pytest.MonkeyPatch, micro_batch: int, images: int, way: str
) -> None:
    ours = engine(Optim(), micro_batch=micro_batch)
    monkeypatch.setattr(ours, "_forward", full)
    with pytest.raises(ValueError, match=f"not enough memory for {images} images at") as caught:
        ours.train_step(batch(0), lr=1e-3, flags=FLAGS)
    assert str(caught.value).endswith(way) and "\n" not in str(caught.value)


class OneBatch:
    """A pass over a split."""

    reader, order = SimpleNamespace(split=range(BATCH)), SimpleNamespace(steps=1)

    def __next__(self) -> Batch:
        return batch(0)


def test_an_evaluation_without_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, loader = engine(Optim()), OneBatch()
    heart: Any = SimpleNamespace(beat=lambda *_: None)
    monkeypatch.setattr(ours.objective.network, "forward", full)
    with pytest.raises(ValueError, match=r"for evaluating 8 images at once .*; free it") as caught:
        ours.evaluate(loader, lambda output: output.logits, heart)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_network_without_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "to", full)
    config = load_config("configs/demo.yaml")
    with pytest.raises(ValueError, match=r"memory for the network and its optimiser .*; free it"):
        build_engine(config, ALONE, objective())
