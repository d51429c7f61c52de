"""Training end to end, beside the loader alone and the step alone."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from time import perf_counter
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks.measure import Measure, in_turn, middle, show, wait_for
from benchmarks.step import resident_batch
from dan_dist.config import Config
from dan_dist.data import Batch, Stream
from dan_dist.engine import Votes, resolve_precision
from dan_dist.parts import build_engine, build_objective, open_train_stream
from dan_dist.progress import Progress
from dan_dist.shardset import ShardSet
from dan_dist.tracking import NullTracker
from dan_dist.world import World

AFFECTNET8_IMAGES = 40 * 287_651  # of the paper's 40 epochs


def run(
    config: Config, world: World, shards: ShardSet, *, steps: int, repeats: int
) -> dict[str, Any]:
    """Prints (rank 0) and returns images/s over all ranks and the share of time spent waiting.

    steps: of each repeat, of each form.
    """
    engine = build_engine(config, world, build_objective(config, shards.class_names, is_new=True))
    resident = resident_batch(config, world, len(shards.class_names))
    votes = Votes(stop=False, save=False, replaced=0)
    with closing(
        open_train_stream(config, world, shards, shards.split("train"), start=0)
    ) as stream:
        progress = _progress(config, stream)

        def train(batch: Batch, done: int) -> None:
            """What the training loop does with a batch."""
            result = engine.train_step(batch, lr=config.optim.lr, votes=votes)
            progress.step(done, batch, result, config.optim.lr)

        measure = partial(_measure, config, world, steps)
        table = in_turn(
            {
                "loader": lambda: measure(lambda done: next(stream)),
                "step": lambda: measure(lambda done: train(resident, done)),
                "end to end": lambda: measure(lambda done: train(next(stream), done), stream),
            },
            repeats + 1, "train",
        )  # fmt: skip
        progress.close()
    table = {name: rows[1:] for name, rows in table.items()}  # the first round warms up
    rows = zip(table["loader"], table["step"], table["end to end"], strict=True)
    shares = sorted(e["images/s"] / min(a["images/s"], b["images/s"]) for a, b, e in rows)
    efficiency = shares[len(shares) // 2]
    rate, wait = (middle(table, "end to end", m) for m in ("images/s", "waiting, %"))
    peak_bytes = _peak_bytes(world)
    if world.is_main:
        show(f"Training, {config.model.image_size} px, global batch {config.train.global_batch}, "
             f"{world.size} ranks, {resolve_precision(config.train.precision, world.device)}",
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
    stream: Stream | None = None,
) -> Measure:
    """Images/s over all ranks of `steps` calls of work(step), which they start and end together."""
    _meet(world)
    began_s, waited_s = perf_counter(), stream.wait_s if stream else 0.0
    for done in range(1, steps + 1):
        work(done)
    _meet(world)
    seconds = perf_counter() - began_s
    waited_s = stream.wait_s - waited_s if stream else 0.0
    return {
        "images/s": steps * config.train.global_batch / seconds,
        "waiting, %": 100 * waited_s / seconds,
    }


def _meet(world: World) -> None:
    wait_for(world.device)
    if world.size > 1:
        dist.barrier()


def _progress(config: Config, stream: Stream) -> Progress:
    """What follows a training, its log lines included, but speaks to nobody."""
    return Progress(
        NullTracker(), stream, visible=False, start=0, total=1, epochs=1, steps_per_epoch=1,
        global_batch=config.train.global_batch, log_every=config.train.log_every, replaced=0,
        replaced_since=None, figures=[], max_skipped=0,
    )  # fmt: skip


def _peak_bytes(world: World) -> int:
    """The most memory that torch held on the GPU; without one, what the process holds now."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return int(psutil.Process().memory_info().rss)
