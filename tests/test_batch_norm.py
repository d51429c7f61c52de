"""BatchNorm over ranks: one rank's results, no wait for the device, one graph for the compiler."""

import copy
from typing import Any

import pytest
import torch
from fake_group import fake_group
from ranks import ranks
from torch import Tensor, nn

from dan_dist.distributed.batch_norm import BatchNorm, Shares, convert_batch_norm
from dan_dist.distributed.world import close_world, init_world
from dan_dist.engine import compile as compiling
from dan_dist.model.dan import DAN
from dan_dist.model.losses import AfnLoss, Objective

CPU = torch.device("cpu")
IMAGES = (4, 3)  # of two ranks
TRACED = ("eager", "traced")


def layer(planes: bool) -> nn.Sequential:
    """A BatchNorm of 6 channels with weights that all differ."""
    torch.manual_seed(7)
    norm = (nn.BatchNorm2d if planes else nn.BatchNorm1d)(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Sequential(norm)


def inputs(planes: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All ranks' images, of a mean far from 0, and the gradient of what becomes of them."""
    random = torch.Generator().manual_seed(3)
    shape = (sum(IMAGES), 6, 5, 4) if planes else (sum(IMAGES), 6)
    x, dy = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    x = x + 30
    if planes:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(dtype), dy.to(dtype)


def results(module: nn.Sequential, call: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients of input, weight and bias, running statistics."""
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(dy)
    norm: Any = module[0]
    found = [y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [t.detach() for t in (*found, norm.num_batches_tracked)]


def over_ranks() -> dict[tuple[str, bool, str], list[Any]]:
    """One rank's part of every case: eager and compiled, maps and vectors, 64 and 16 bits.

    Nested lists: a tensor's memory would go with its process.
    """
    world = init_world("cpu")
    first = sum(IMAGES[: world.rank])
    own = slice(first, first + IMAGES[world.rank])
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        shares = Shares(CPU, wide)
        shares.announce(IMAGES)
        for planes in (False, True):
            x, dy = inputs(planes, dtype)
            for how in TRACED:
                module: Any = convert_batch_norm(layer(planes).to(wide), shares)
                call = module
                if how == "traced":
                    call = torch.compile(module, backend="aot_eager", fullgraph=True)
                values = results(module, call, x[own], dy[own])
                found[how, planes, str(dtype)] = [v.double().tolist() for v in values]
    close_world(world)
    return found


@pytest.fixture(scope="module")
def parts() -> list[dict[tuple[str, bool, str], list[Tensor]]]:
    """Of each rank: each case's tensors, in float64."""
    found = ranks(2, over_ranks)
    double = torch.float64
    return [{k: [torch.tensor(v, dtype=double) for v in case] for k, case in part.items()}
            for part in found]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("how", TRACED)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_two_ranks_of_unequal_shares_equal_one(
    parts: Any, how: str, planes: bool, dtype: torch.dtype, within: float
) -> None:
    """Weights' gradients are the ranks' sums. bfloat16: to its own two or three digits."""
    whole = layer(planes).to(torch.promote_types(dtype, torch.float32))
    y, dx, dweight, dbias, *running = results(whole, whole, *inputs(planes, dtype))
    mine = [part[how, planes, str(dtype)] for part in parts]
    pairs = [
        (torch.cat([m[0] for m in mine]), y),
        (torch.cat([m[1] for m in mine]), dx),
        (mine[0][2] + mine[1][2], dweight),
        (mine[0][3] + mine[1][3], dbias),
        *((m[4 + k], running[k]) for m in mine for k in range(3)),
    ]
    for found, expected in pairs:
        assert torch.allclose(found, expected.double(), rtol=within, atol=within)


@pytest.fixture
def two_ranks() -> Any:
    """A process group of two, of whom the other one does nothing."""
    with fake_group(2):
        yield
    torch._dynamo.reset()


def objective(afn: AfnLoss = "partition") -> Objective:
    torch.manual_seed(0)
    return Objective(DAN(7, 2, width=16), 7, afn=afn)


def graph_breaks(model: Objective) -> tuple[int, list[Any]]:
    """Graphs, and reasons for more than one, of a whole forward pass."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.randn(4, 3, 32, 32), torch.arange(4), 8)
    return found.graph_count, found.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("afn", ["partition", "partition_release"])
def test_the_objective_is_one_graph_at_two_ranks(two_ranks: None, afn: AfnLoss) -> None:
    shares = Shares(CPU, torch.float32)
    shares.announce((4, 4))
    model: Any = convert_batch_norm(objective(afn), shares)
    assert any(isinstance(m, BatchNorm) for m in model.modules())
    assert graph_breaks(model) == (1, [])


@pytest.mark.slow
def test_the_objective_is_one_graph_under_ddp(
    two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which by torch's default is compiled in pieces, one for each bucket of gradients."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    shares = Shares(CPU, torch.float32)
    shares.announce((4, 4))
    model: Any = convert_batch_norm(objective(), shares)
    with torch._dynamo.config.patch(optimize_ddp=True):
        compiling.CompiledModule(model)
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        parallel(torch.randn(4, 3, 32, 32), torch.arange(4), 8)
    assert len(graphs) == 1


def test_the_objective_is_one_graph_at_one_rank() -> None:
    assert graph_breaks(objective()) == (1, [])


def test_the_state_is_that_of_the_plain_network(two_ranks: None) -> None:
    plain = objective()
    shares = Shares(CPU, torch.float32)
    ours = convert_batch_norm(copy.deepcopy(plain), shares)
    expected = plain.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())


def test_other_images_than_were_announced_are_refused(two_ranks: None) -> None:
    shares = Shares(CPU, torch.float32)
    shares.announce((4, 3))
    norm = convert_batch_norm(layer(planes=False), shares)
    with pytest.raises(AssertionError, match="announced"):
        norm(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"takes \(N, C, …\), got \(4,\)"):
        norm(torch.randn(4))


def test_shares_add_up_and_stay_where_they_are(two_ranks: None) -> None:
    shares = Shares(CPU, torch.float64)
    shares.announce((5, 3))
    first = shares.parts
    assert torch.equal(first, torch.tensor([[5 / 8], [3 / 8]], dtype=torch.float64))
    shares.announce((4, 4))
    shares.announce((5, 3))
    assert shares.parts is first and shares.total == 8
