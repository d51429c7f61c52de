"""Training end to end, beside the loader alone and the step alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks.measure import Measure, in_turn, middle, show, wait_for
from benchmarks.step import resident_batch
from dan_dist.build import build_engine, initial_objective, open_train_loader
from dan_dist.config import Config
from dan_dist.data.loader import Batch, Loader
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import StepFlags
from dan_dist.engine.precision import resolve_precision
from dan_dist.monitor import Monitor
from dan_dist.run.plan import make_plan
from dan_dist.run.signals import StopRequest
from dan_dist.run.state import TrainState
from dan_dist.tracking.tracker import NullTracker
from shards.format import ShardSet

AFFECTNET8_IMAGES = 40 * 287_651  # of the paper's 40 epochs


def run(
    config: Config, world: World, shards: ShardSet, *, steps: int, repeats: int
) -> dict[str, Any]:
    """Prints (rank 0) and returns images/s over all ranks and the share of time spent waiting.

    steps: of each repeat, of each form.
    """
    engine = build_engine(config, world, initial_objective(config, shards.class_names, is_new=True))
    engine.warm_up(config.model.image_size)
    resident = resident_batch(config, world, len(shards.class_names))
    flags = StepFlags(stop=False, save=False, replaced=0)
    with (
        open_train_loader(config, world, shards.split("train"), start=0) as loader,
        _monitor(config, world, loader) as monitor,
    ):

        def train(batch: Batch, done: int) -> None:
            """What the training loop does with a batch."""
            result = engine.train_step(batch, lr=config.optim.lr, flags=flags)
            monitor.step(done, batch, result)

        measure = partial(_measure, config, world, steps)
        table = in_turn(
            {
                "loader": lambda: measure(lambda done: next(loader)),
                "step": lambda: measure(lambda done: train(resident, done)),
                "end to end": lambda: measure(lambda done: train(next(loader), done), loader),
            },
            repeats + 1, "train",
        )  # fmt: skip
    table = {name: rows[1:] for name, rows in table.items()}  # the first round warms up
    rows = zip(table["loader"], table["step"], table["end to end"], strict=True)
    shares = sorted(e["images/s"] / min(a["images/s"], b["images/s"]) for a, b, e in rows)
    efficiency = shares[len(shares) // 2]
    rate, wait = (middle(table, "end to end", m) for m in ("images/s", "waiting, %"))
    peak_bytes = _peak_bytes(world)
    precision = resolve_precision(config.train.precision, world.device, config.engine.name)
    if world.is_main:
        show(f"Training, {config.model.image_size} px, global batch {config.train.global_batch}, "
             f"{world.size} ranks, {precision}",
             table, {"images/s": ".1f", "waiting, %": ".1f"}, {})  # fmt: skip
        print(f"efficiency (end to end ÷ the slower of loader and step): {100 * efficiency:.1f} % "
              f"({100 * shares[0]:.1f} to {100 * shares[-1]:.1f}), waiting for data {wait:.1f} %; "
              f"peak memory {peak_bytes / 2**30:.2f} GiB of rank 0\n"
              "AffectNet-8's 40 epochs, 11.5 million images, would take "
              f"{AFFECTNET8_IMAGES / rate / 60:.0f} minutes at that rate (arithmetic)")  # fmt: skip
    return {"table": table, "efficiency": efficiency, "peak_bytes": peak_bytes}


def _measure(
    config: Config,
    world: World,
    steps: int,
    work: Callable[[int], object],
    loader: Loader | None = None,
) -> Measure:
    """Images/s over all ranks of `steps` calls of work(step), which they start and end together."""
    _meet(world)
    began_s, waited_s = perf_counter(), loader.wait_s if loader else 0.0
    for done in range(1, steps + 1):
        work(done)
    _meet(world)
    seconds = perf_counter() - began_s
    waited_s = loader.wait_s - waited_s if loader else 0.0
    return {
        "images/s": steps * config.train.global_batch / seconds,
        "waiting, %": 100 * waited_s / seconds,
    }


def _meet(world: World) -> None:
    wait_for(world.device)
    if world.size > 1:
        dist.barrier()


def _monitor(config: Config, world: World, loader: Loader) -> Monitor:
    """Follows the steps as in a training, log lines included; like any rank but 0 it is silent."""
    plan = make_plan(config, images=len(loader.reader.split), start=0)
    silent = replace(world, rank=world.size)
    return Monitor(config.train, silent, plan, TrainState(), NullTracker(), loader, StopRequest())


def _peak_bytes(world: World) -> int:
    """The most memory that torch held on the GPU; without one, what the process holds now."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return int(psutil.Process().memory_info().rss)
