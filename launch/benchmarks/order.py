"""The sampler's time, and the memory of a rank, by the size of the data set."""

import multiprocessing
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Measure, Table, in_turn, show
from dan_dist.data.mixture import shares_of
from dan_dist.data.order import TrainOrder
from dan_dist.data.sampler import epoch_order, group_samples, take_turns
from dan_dist.data.shares import power
from shards.format import (
    Manifest,
    Shard,
    open_shardset,
    write_index,
    write_manifest,
)
from shards.index import INDEX_DTYPE
from shards.releases.affectnet import TRAIN

BATCH = 256
POWER = 0.5
SAMPLINGS = ("balanced", "shuffle", f"power {POWER}")
SIZES = (290_000, 10_000_000)  # images: AffectNet's, and the largest set in the field, whose …
IDENTITIES = 80_000  # … classes are persons, mixed in all shards
SHARD_IMAGES, IMAGE_BYTES = 1000, 20_000
WATCH_S = 0.002

Labels = np.ndarray[Any, np.dtype[np.int32]]


def run(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Prints and returns both; an index of ten million images is written into `folder`."""
    contenders = {
        f"{size:,} images, {sampling}": (size, len(TRAIN), sampling)
        for size in SIZES
        for sampling in SAMPLINGS
    }
    for sampling in SAMPLINGS:
        persons = f"{SIZES[-1]:,} images of {IDENTITIES:,} identities, {sampling}"
        contenders[persons] = SIZES[-1], IDENTITIES, sampling
    labels = {kind: _labels(*kind) for kind in {(size, n) for size, n, _ in contenders.values()}}
    times: Table = in_turn(
        {
            name: partial(_order, labels[size, classes], sampling)
            for name, (size, classes, sampling) in contenders.items()
        },
        repeats, "order",
    )  # fmt: skip
    show(
        f"The order of an epoch, global batch {BATCH}", times, {"groups, s": ".3f", "s": ".3f"}, {}
    )
    memory = {}
    print("\nMemory of a rank that are its own pages, at most, over an epoch's border\n\n"
          "| | MiB | bytes an image | start, s |\n|---|---|---|---|")  # fmt: skip
    base: dict[str, float] = {}
    for name, (size, classes, sampling) in contenders.items():
        root = _write_index(folder / f"index-{size}-{classes}", labels[size, classes], classes)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak_bytes, start_s = pool.apply(_anonymous, (root, sampling))
        base.setdefault(sampling, peak_bytes)
        slope = (peak_bytes - base[sampling]) / (size - SIZES[0]) if size > SIZES[0] else 0.0
        memory[name] = {"peak_bytes": peak_bytes, "bytes_an_image": slope, "start_s": start_s}
        growth = f"{slope:.1f}" if slope else "–"
        print(f"| {name} | {peak_bytes / 2**20:.0f} | {growth} | {start_s:.2f} |", flush=True)
    return {"times": times, "memory": memory}


def _labels(size: int, classes: int) -> Labels:
    """AffectNet's proportions, sorted as class-pure shards are; or persons, in a drawn order."""
    if classes == IDENTITIES:
        return np.random.default_rng(0).integers(classes, size=size, dtype=np.int32)
    bounds = np.cumsum(TRAIN) / sum(TRAIN) * size
    return np.searchsorted(bounds, np.arange(size), side="right").astype(np.int32)


def _order(labels: Labels, sampling: str) -> Measure:
    began_s = time.perf_counter()
    groups = group_samples(labels, balanced=sampling != "shuffle")
    grouped_s = time.perf_counter()
    is_equal = not sampling.startswith("power")
    shares = None if is_equal else power([len(ids) for ids in groups], POWER)
    turns = take_turns(groups, global_batch=BATCH, shares=shares)
    epoch_order(groups, global_batch=BATCH, seed=0, epoch=1, turns=turns)
    return {"groups, s": grouped_s - began_s, "s": time.perf_counter() - grouped_s}


def _write_index(root: Path, labels: Labels, classes: int) -> Path:
    """A set of these images whose tars are holes; what a rank reads at its start is there."""
    if root.exists():
        return root
    root.mkdir()
    size = len(labels)
    index = np.zeros(size, INDEX_DTYPE)
    number = np.arange(size)
    index["shard"], index["label"] = number // SHARD_IMAGES, labels
    index["offset"], index["size"] = number % SHARD_IMAGES * IMAGE_BYTES, IMAGE_BYTES
    shards = []
    for shard in range(-(-size // SHARD_IMAGES)):
        samples = min(SHARD_IMAGES, size - shard * SHARD_IMAGES)
        path = root / f"train-{shard:06d}.tar"
        with path.open("wb") as file:
            file.truncate(samples * IMAGE_BYTES)
        shards.append(Shard(path.name, None, samples, samples * IMAGE_BYTES, "0" * 64))
    manifest = Manifest(
        dataset="holes", release="none", image_size=224, image_policy="",
        face_cut="as_released",
        class_names=tuple(f"class {k}" for k in range(classes)),
        splits={"train": write_index(root, "train", shards, index, classes)},
        dropped={}, dropped_names=[], pack_sha256="",
    )  # fmt: skip
    write_manifest(root, manifest)
    return root


def _anonymous(root: Path, sampling: str) -> tuple[int, float]:
    """The most anonymous memory of a process that orders three epochs, and its start's seconds."""
    peak_bytes, is_over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_bytes
        while not is_over.wait(WATCH_S):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak_bytes = max(peak_bytes, 1024 * int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began_s = time.perf_counter()
    split = open_shardset(root).split("train")
    shares = {"power": POWER} if sampling.startswith("power") else sampling
    order = TrainOrder(
        split, slice(0, BATCH), global_batch=BATCH, seed=0, balanced=sampling != "shuffle",
        shares=shares_of(split, shares),
    )  # fmt: skip
    order(0)
    start_s = time.perf_counter() - began_s
    for step in (order.steps - 1, order.steps, 2 * order.steps):
        order(step)
    order.close()
    is_over.set()
    watcher.join()
    return peak_bytes, start_s
