"""A training step on fake CUDA tensors: nothing in it waits for the device.

They have a real dispatcher, real device checks and no kernels. Autograd cannot run on them, so the
backward pass is looked at as it is traced, and by its own function.
"""

import os
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_group import fake_group
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dan_dist.config import Optim
from dan_dist.data.loader import Batch
from dan_dist.distributed.batch_norm import Over, Shares, convert_batch_norm, gradients
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Loss, Objective

AVERAGED = Optim(name="sgd", clip_norm=1.0, ema=0.99)
IMAGES, SIZE, CLASSES, RANKS = 4, 64, 7, 8
WAITS = ("_local_scalar_dense", "nonzero", "aten.equal.", "unique")


class Log(TorchDispatchMode):
    """Operations, and those among them that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before, after = devices((args, kwargs)), devices(found)
        name = str(func)
        masked = name.startswith("aten.index") and is_masked(args[1])
        to_host = "cuda" in before and "cpu" in after
        waits = any(word in name for word in WAITS) and "cuda" in before
        pageable = "cpu" in before and after == {"cuda"} and not (kwargs or {}).get("non_blocking")
        if masked or to_host or waits or (pageable and "copy" in name):
            self.waits.append(f"{name} {before}->{after} {place()}")
        if not func.is_view:
            self.count[name] += 1
        return found


def is_masked(indices: Any) -> bool:
    """Whether a list of indices holds a mask, whose result's size a device has to tell."""
    return isinstance(indices, list | tuple) and any(
        isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in indices
    )


def masked_nodes(graph: torch.fx.GraphModule) -> list[str]:
    """The operations of a traced graph that index by a mask."""
    found = []
    for node in graph.graph.nodes:
        if str(node.target).startswith("aten.index") and isinstance(node.args[1], list | tuple):
            indices = [n and n.meta["val"] for n in node.args[1]]
            found += [node.name] * is_masked(indices)
    return found


def devices(tree: Any) -> set[str]:
    """Of tensors that are more than a number: those come along as constants."""
    return {t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)}


def place() -> str:
    """The lines of ours that an operation comes from."""
    frames = [f for f in traceback.extract_stack() if f"{os.sep}dan_dist{os.sep}" in f.filename]
    return "|".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)


class FakeEngine(Engine):
    """Whose backward pass is gradients out of nothing, and which no DDP wraps."""

    def _wrap(self) -> torch.nn.Module:
        return self.objective

    def _forward_backward(self, images: Tensor, labels: Tensor, *, last: bool) -> Loss:
        loss = self._forward(images, labels)
        self.scaler.scale(loss.total)
        for parameter in self.objective.parameters():
            parameter.grad = torch.empty_like(parameter)
        return loss


@pytest.fixture
def many_ranks() -> Iterator[None]:
    with fake_group(RANKS):
        yield


@pytest.fixture
def shapes() -> Iterator[None]:
    """Of kernels that torch itself knows no shapes of."""
    library = Library("aten", "IMPL", "Meta")

    def statistics(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = (x.new_empty(x.size(1), dtype=wide) for _ in range(2))
        return mean, var

    library.impl("batch_norm_update_stats", statistics)
    library.impl("_fused_sgd_", lambda *_, **__: None)
    yield
    library._destroy()


def fake_step(
    monkeypatch: pytest.MonkeyPatch, size: int, optim: Optim, loss: dict[str, Any], **given: Any
) -> Log:
    """The log of a second step: the first one makes the optimiser's state.

    loss: of `Objective`. given: of `StepOptions`.
    """
    monkeypatch.setattr(Objective, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            objective = Objective(DAN(CLASSES, 4), CLASSES, **loss)
        world = World(0, 0, size, size, device)
        options = StepOptions(global_batch=IMAGES * size, **{"precision": "bf16", **given})
        engine = FakeEngine(objective, world, optim, options)
        pixels = torch.empty(IMAGES, SIZE, SIZE, 3, device=device).permute(0, 3, 1, 2)
        labels = torch.zeros(IMAGES, dtype=torch.int64, device=device)
        if options.soft:
            labels = torch.zeros(IMAGES, 1 + CLASSES, device=device)
        batch = Batch(pixels, labels, torch.arange(IMAGES))
        for _ in range(2):
            with Log() as log:
                result = engine.train_step(batch, lr=1e-4, flags=StepFlags(False, False, 0))
        assert {t.device.type for t in result[:3]} == {"cuda"}
    return log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "optim", "loss", "given"),
    [
        (1, Optim(), {}, {}),
        (1, AVERAGED, {"afn": "partition_release"}, {"soft": True}),
        (RANKS, AVERAGED, {}, {}),
        (RANKS, Optim(), {"afn": "partition_release", "fcn": "center"}, {"micro_batch": 2}),
        (RANKS, Optim(), {"afn": "none", "fcn": "none"}, {"soft": True, "precision": "fp16"}),
    ],
)
def test_forward_and_update_never_wait(
    monkeypatch: pytest.MonkeyPatch, shapes: None, request: pytest.FixtureRequest,
    size: int, optim: Optim, loss: dict[str, Any], given: dict[str, Any],
) -> None:  # fmt: skip
    if size > 1:
        request.getfixturevalue("many_ranks")
    log = fake_step(monkeypatch, size, optim, loss, **given)
    assert log.waits == []
    gathers = log.count["_c10d_functional.all_gather_into_tensor.default"]
    passes = IMAGES // given.get("micro_batch", IMAGES)
    assert gathers == (41 * passes if size > 1 else 0)  # one a BatchNorm
    fused = "aten._fused_adam_.default" if optim.name == "adam" else "aten._fused_sgd_.default"
    assert log.count[fused] == 1


def test_the_backward_of_a_layer_never_waits(many_ranks: None) -> None:
    shape = (IMAGES, 6, 5, 5)
    with FakeTensorMode(), Log() as log, torch.device("cuda", 0):
        dy, x = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
        weight, mean, var = (torch.empty(6) for _ in range(3))
        group: Any = dist.group.WORLD
        dx, *_ = gradients(dy, x, weight, mean, var, Over(100, 1e-5, group.group_name))
    assert dx.shape == shape and dx.dtype == torch.bfloat16 and dx.device.type == "cuda"
    assert log.waits == []
    assert log.count["_c10d_functional.all_reduce.default"] == 1


@pytest.mark.slow
def test_the_traced_backward_never_waits(many_ranks: None) -> None:
    """Of the whole objective, as a compiler gets it."""
    shares = Shares(torch.device("cpu"), torch.float32)
    shares.announce([IMAGES] * RANKS)
    network = DAN(CLASSES, 2, width=16)
    objective: Any = convert_batch_norm(Objective(network, CLASSES), shares)
    traced: dict[str, Counter[str]] = {}
    masked: list[str] = []

    def keep(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            calls = [node for node in graph.graph.nodes if node.op == "call_function"]
            traced[name] = Counter(str(node.target) for node in calls)
            masked.extend(masked_nodes(graph))
            return graph.forward

        return compiler

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    compiled = torch.compile(objective, backend=backend, fullgraph=True)
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    compiled(images, torch.arange(IMAGES), IMAGES * RANKS).total.backward()
    torch._dynamo.reset()
    layers = sum(hasattr(m, "shares") for m in objective.modules())
    for name, collective in (("forward", "all_gather_into_tensor"),
                             ("backward", "reduce_scatter_tensor")):  # fmt: skip
        found = traced[name]
        assert found[f"_c10d_functional.{collective}.default"] == layers
        assert not [op for op in found if any(word in op for word in WAITS)]
    assert not masked


@pytest.mark.parametrize(("mask", "number"), [(True, 1), (False, 0)])
def test_a_mask_is_told_from_indices(mask: bool, number: int) -> None:
    x = torch.zeros(3, 4)
    index = torch.tensor([True, False, True] if mask else [0, 2])
    graph = make_fx(lambda x, i: torch.index_put(x, [i], x.sum()), tracing_mode="fake")(x, index)
    assert len(masked_nodes(graph)) == number
