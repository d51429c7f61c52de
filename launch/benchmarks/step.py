"""The training step on data that lies ready: from the plainest form of it to the one that trains.

Each row adds one thing to the row above it. The bound is that of the roofline: the step can take no
less time than its operations at the speed of a large matrix product, nor than its memory traffic at
the speed of a copy, both measured here.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Measure, in_turn, middle, show, wait_for
from dan_dist.build import build_engine, initial_objective
from dan_dist.config import Config
from dan_dist.data.loader import Batch
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import StepFlags
from dan_dist.engine.precision import resolve_precision
from dan_dist.model.arithmetic import choose_arithmetic
from shards.format import ShardSet

PLAIN, TRAINED = "plain: float32, contiguous", "as trained"


def run(
    config: Config, world: World, shards: ShardSet, *, steps: int, repeats: int, tried: bool
) -> dict[str, Any]:
    """Prints and returns the table, and the bound.

    config: train.global_batch is this rank's batch. steps: of each repeat. tried: rows of what was
    left out as well.
    """
    precision = resolve_precision(config.train.precision, world.device, config.engine.name)
    batch = resident_batch(config, world, len(shards.class_names))
    plain = partial(_plain_step, config, world, shards, batch)
    contenders: dict[str, Callable[[], object]] = {PLAIN: plain(channels_last=False, bf16=False)}
    if on_gpu := world.device.type == "cuda":  # torch's default there
        contenders["+ TF32"] = plain(channels_last=False, bf16=False, tf32=True)
    contenders["+ channels_last"] = plain(channels_last=True, bf16=False, tf32=on_gpu)
    if precision == "bf16":
        contenders["+ bfloat16"] = plain(channels_last=True, bf16=True)
    contenders[TRAINED] = engine_step(config, world, shards, batch)
    if tried:
        with_compile = config.train.model_copy(update={"compile": True})
        contenders["train.compile"] = engine_step(
            config.model_copy(update={"train": with_compile}), world, shards, batch
        )
        contenders["fused optimiser"] = plain(
            channels_last=True, bf16=precision == "bf16", fused=True
        )
    for step in contenders.values():  # warms up, and compiles
        for _ in range(3):
            step()
    size, images = config.model.image_size, len(batch.labels)
    measure = partial(_measure, steps=steps, images=images, device=world.device)
    chosen = {name: partial(measure, step) for name, step in contenders.items()}
    table = in_turn(chosen, repeats, "step")
    show(f"Step, {size} px, batches of {images}, {precision}", table,
         {"ms": ".1f", "images/s": ".1f"}, {"images/s": PLAIN})  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bound = _roofline(contenders[TRAINED], world.device, dtype)
    bound["share"] = bound["bound_ms"] / middle(table, TRAINED, "ms")
    print("{gflop:.0f} GFLOP at {gflops:.0f} GFLOP/s, {gbytes:.2f} GB of traffic at {gbytes_s:.1f} "
          "GB/s: {bound_ms:.1f} ms at least; the step reaches {percent:.0f} % of that bound".format(
              percent=100 * bound["share"], **bound))  # fmt: skip
    return {"table": table, "roofline": bound}


def resident_batch(config: Config, world: World, classes: int) -> Batch:
    """Random images on the device, laid out as the loader's are."""
    images, size = config.train.global_batch // world.size, config.model.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, size, size, 3, generator=generator).to(world.device)
    labels = torch.arange(images, device=world.device) % classes
    return Batch(pixels.permute(0, 3, 1, 2), labels, torch.arange(images))


def engine_step(
    config: Config, world: World, shards: ShardSet, batch: Batch
) -> Callable[[], Tensor]:
    """What training does with a batch."""
    engine = build_engine(config, world, initial_objective(config, shards.class_names, is_new=True))
    engine.warm_up(config.model.image_size)
    flags = StepFlags(stop=False, save=False, replaced=0)
    precision = resolve_precision(config.train.precision, world.device, config.engine.name)

    def step() -> Tensor:
        choose_arithmetic(precision, deterministic=config.train.deterministic)
        return engine.train_step(batch, lr=config.optim.lr, flags=flags).losses

    return step


def _measure(
    step: Callable[[], object], *, steps: int, images: int, device: torch.device
) -> Measure:
    seconds = seconds_a_call(step, steps, device)
    return {"ms": 1e3 * seconds, "images/s": images / seconds}


def seconds_a_call(work: Callable[[], object], times: int, device: torch.device) -> float:
    """The mean of so many calls, one after another."""
    wait_for(device)
    began_s = perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (perf_counter() - began_s) / times


def _plain_step(
    config: Config, world: World, shards: ShardSet, batch: Batch,
    *, channels_last: bool, bf16: bool, tf32: bool = False, fused: bool = False,
) -> Callable[[], Tensor]:  # fmt: skip
    """The step as a textbook writes it."""
    objective = initial_objective(config, shards.class_names, is_new=True).to(world.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    objective.to(memory_format=layout)
    images = batch.images.contiguous(memory_format=layout)
    parameters, lr = objective.parameters(), config.optim.lr
    optimizer: torch.optim.Optimizer
    if config.optim.name == "adam":
        optimizer = torch.optim.Adam(parameters, lr, foreach=False, fused=fused)
    else:
        momentum = config.optim.momentum
        optimizer = torch.optim.SGD(parameters, lr, momentum, foreach=False, fused=fused)

    def step() -> Tensor:
        choose_arithmetic("tf32" if tf32 else "float32")
        optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            loss = objective(images, batch.labels, len(images))
        loss.total.backward()
        optimizer.step()
        parts: Tensor = loss.parts
        return parts

    return step


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that operations read and write, where each reads its inputs once and nothing is kept
    in a cache from one to the next: what fusion and caches can save is in it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor):
                    self.total_bytes += leaf.nbytes
        return result


def _roofline(step: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Measure:
    """Operations and memory traffic of a step, counted, and the speeds of both, measured."""
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        step()
    flops, bytes_s = _matrix_flops(device, dtype), _copy_bytes_s(device)
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "gbytes": traffic.total_bytes / 1e9,
        "gflops": flops / 1e9,
        "gbytes_s": bytes_s / 1e9,
        "bound_ms": 1e3 * max(counter.get_total_flops() / flops, traffic.total_bytes / bytes_s),
    }


def _matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of a few."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return float(2 * n**3 / min(seconds_a_call(lambda: a @ b, 3, device) for _ in range(5)))


def _copy_bytes_s(device: torch.device) -> float:
    """Bytes read and written a second by a large copy, the best of a few."""
    source = torch.zeros(2**28, device=device)  # 1 GiB
    target = torch.ones_like(source)
    best_s = min(seconds_a_call(lambda: target.copy_(source), 1, device) for _ in range(5))
    return float(2 * source.nbytes / best_s)
