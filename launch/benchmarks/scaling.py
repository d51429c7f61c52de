"""More ranks on this machine, measured, and more machines, projected from what was measured."""

import json
import tempfile
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.measure import consume, torchrun
from benchmarks.projection import Links, Parts, batches, show_projection, tables
from benchmarks.step import engine_step, resident_batch, seconds_a_call
from dan_dist.build import initial_objective, open_train_loader
from dan_dist.config import Config, layered
from dan_dist.distributed.world import World
from shards.format import ShardSet
from shards.limits import core_count

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def run(
    words: list[str], config: Config, world: World, shards: ShardSet, *,
    ranks: list[int] | None, steps: int, repeats: int, link_gb_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Prints and returns images/s of 1 … N ranks of this machine, and what is projected beyond.

    words: the configuration's file and overrides. config: train.global_batch is this rank's batch,
    and every rank's in the measured table (weak scaling). A rank has the same share of the cores
    however many there are, one alone too.
    """
    batch = config.train.global_batch
    places = torch.cuda.device_count() if world.device.type == "cuda" else core_count()
    sizes = ranks or [n for n in (1, 2, 4, 8, 16) if n <= places]
    rates: dict[int, list[float]] = {}
    print(f"\nScaling, {batch} images a rank\n\n| ranks | images/s | of linear |\n|---|---|---|")
    own = layered(words, [f"data.shards={shards.root}"])
    for size in sizes:
        threads = max(1, core_count() // max(sizes))
        rates[size] = _train(own, size, batch, steps, repeats, threads)
        linear = median(rates[size]) / median(rates[sizes[0]]) * sizes[0] / size
        spread = f"{median(rates[size]):.1f} ({min(rates[size]):.1f} to {max(rates[size]):.1f})"
        print(f"| {size} | {spread} | {100 * linear:.1f} % |", flush=True)
    parts = measure_parts(config, world, shards, steps=steps, links=Links(between_gb_s=link_gb_s))
    projected = tables(parts, batch)
    show_projection(parts, projected)
    rows = {name: [row._asdict() for row in found] for name, found in projected.items()}
    return {"images_per_s": rates, "parts": asdict(parts), "projected": rows}


def measure_parts(
    config: Config, world: World, shards: ShardSet, *, steps: int, links: Links
) -> Parts:
    """One rank's step at each batch of a projection, and its loader, measured; the rest counted."""
    classes, step_s = len(shards.class_names), {}
    for images in batches(config.train.global_batch):
        train = config.train.model_copy(update={"global_batch": images, "micro_batch": None})
        own = config.model_copy(update={"train": train})
        step = engine_step(own, world, shards, resident_batch(own, world, classes))
        for _ in range(3):
            step()
        step_s[images] = median(seconds_a_call(step, steps, world.device) for _ in range(3))
    threads = max(1, core_count() // links.ranks_a_node)  # a node's ranks share its cores
    data = config.data.model_copy(update={"threads": threads})
    own = config.model_copy(update={"data": data})
    with open_train_loader(own, world, shards.split("train"), start=0) as loader:
        images = steps * config.train.global_batch
        found = consume((next(loader).images for _ in count()), images, world.device)
    objective = initial_objective(config, shards.class_names, is_new=True)
    gradient_bytes = sum(p.numel() * p.element_size() for p in objective.parameters())
    norms = sum(isinstance(module, NORMS) for module in objective.modules())
    return Parts(step_s, found["images/s"], threads, gradient_bytes, norms, links)


def _train(
    words: list[str], ranks: int, batch: int, steps: int, repeats: int, threads: int
) -> list[float]:
    """Images/s, end to end, of every repeat of a training on that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        torchrun(
            ranks, "bench.py", "train", *layered(words, [f"data.threads={threads}"]),
            "--batch", str(batch), "--steps", str(steps), "--repeats", str(repeats),
            "--json", str(found), OMP_NUM_THREADS=str(threads),
        )  # fmt: skip
        rows = json.loads(found.read_text())["train"]["table"]["end to end"]
    return [row["images/s"] for row in rows]
