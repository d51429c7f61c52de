"""The packer beside webdataset's ShardWriter."""

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import webdataset

from benchmarks.measure import Measure, Table, in_turn, show
from dan_dist.world import core_count
from shards import affectnet, layouts

POLL_S = 0.1
SIZE = 224  # pixels
DISTINCT = 2000  # images; the others are hard links


def run(folder: Path, *, images: int, repeats: int) -> Table:
    """AffectNet's reduced release from listing to finished shards, in turn with the peer."""
    source, workers = folder / "source", core_count()
    layouts.write_affectnet_reduced(
        source, images, 8, size=SIZE, seed=0, distinct=min(DISTINCT, images)
    )
    ours, peer = f"shards.pack, {workers} workers", "ShardWriter, 1 process"
    table = in_turn(
        {
            ours: lambda: _pack_ours(source, folder / "ours", images + 8, workers),
            peer: lambda: _pack_with_shardwriter(source, folder / "theirs"),
        },
        repeats, "pack",
    )  # fmt: skip
    show(f"Packing {images} images of {SIZE} px, {min(DISTINCT, images)} of them distinct",
         table, {"images/s": ".0f"}, {"images/s": peer})  # fmt: skip
    peak_mib = max(row["peak RSS, MiB"] for row in table[ours])
    print(f"memory of all processes of shards.pack together: {peak_mib:.0f} MiB at most")
    return table


def _pack_ours(source: Path, out: Path, images: int, workers: int) -> Measure:
    """Images/s of the documented command, and the most memory that its processes held together."""
    command = [sys.executable, "-m", "shards.pack", "affectnet", "--source", str(source), "--out",
               str(out), "--size", str(SIZE), "--workers", str(workers)]  # fmt: skip
    began, peak_bytes = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [tree, *tree.children(recursive=True)]
            peak_bytes = max(peak_bytes, sum(p.memory_info().rss for p in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(POLL_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    rate = images / (time.perf_counter() - began)
    shutil.rmtree(out)
    return {"images/s": rate, "peak RSS, MiB": peak_bytes / 2**20}


def _pack_with_shardwriter(source: Path, out: Path) -> Measure:
    """Images/s of webdataset's own writer, fed with the same samples by this process."""
    logging.disable(logging.WARNING)
    out.mkdir()
    began = time.perf_counter()
    release = affectnet.release(source, size=SIZE, margin=0.0)
    count = 0
    for split, items in release.splits.items():
        pattern = str(out / f"{split}-%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=1000, verbose=0) as writer:
            for item in items:
                image, meta = release.read(item)
                sample = {"__key__": item.key, "jpg": image, "cls": item.label, "json": meta}
                writer.write(sample)
                count += 1
    rate = count / (time.perf_counter() - began)
    shutil.rmtree(out)
    return {"images/s": rate}
