"""Measures the pipeline on this machine: python launch/bench.py pack|saving|engines [options]

Every figure stands beside a peer's, measured in the same run on the same input.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import webdataset

from dan_dist import checkpoint, parts, train
from dan_dist.config import load_config
from dan_dist.engine import Votes
from dan_dist.journal import Journal
from dan_dist.shardset import open_shardset
from dan_dist.world import init_world
from shards import affectnet, layouts

POLL_S = 0.1


def main(arguments: list[str]) -> int:
    """Runs one part; prints a table, and JSON to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    packing = parts.add_parser("pack", help="images/s of the packer beside webdataset.ShardWriter")
    packing.add_argument("--images", type=int, default=30_000, help="default 30000")
    packing.add_argument("--distinct", type=int, default=2000, help="the others are hard links")
    packing.add_argument("--size", type=int, default=224, help="pixels (default 224)")
    packing.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    packing.add_argument("--repeats", type=int, default=3, help="default 3; medians are printed")
    packing.add_argument("--folder", help="where to write (default: a temporary folder)")
    safety = parts.add_parser("saving", help="what checkpoints and the journal cost")
    safety.add_argument("--config", default="configs/demo.yaml")
    safety.add_argument("--steps", type=int, default=120, help="default 120")
    parity = parts.add_parser("engines", help="DDP beside DeepSpeed's stages: the same training?")
    parity.add_argument("--config", default="configs/demo.yaml")
    parity.add_argument("--steps", type=int, default=20, help="default 20")
    parity.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2")
    for part in (packing, safety, parity):
        part.add_argument("--json", help="a file for the figures")
    options = parser.parse_args(arguments)
    figures: dict[str, Any]
    if options.part == "saving":
        figures = saving(options.config, options.steps)
    elif options.part == "engines":
        figures = engines(options.config, options.steps, options.ranks)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures = pack(
                Path(folder), options.images, options.distinct, options.size, options.workers,
                options.repeats,
            )  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def pack(
    folder: Path, images: int, distinct: int, size: int, workers: int, repeats: int
) -> dict[str, float]:
    """AffectNet's reduced release from listing to finished shards, in turn with the peer."""
    source = folder / "source"
    began = time.perf_counter()
    layouts.write_affectnet_reduced(
        source, images, 8, size=size, seed=0, distinct=min(distinct, images)
    )
    print(f"a reduced release of {images} images ({distinct} distinct) in "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip
    ours, theirs, peaks = [], [], []
    for _ in range(repeats):
        rate, peak_bytes = _pack_ours(source, folder / "ours", images + 8, size, workers)
        ours.append(rate)
        peaks.append(peak_bytes)
        theirs.append(_pack_with_shardwriter(source, folder / "theirs", size))
    ours_median, theirs_median = median(ours), median(theirs)
    print(f"{'':34}{'images/s':>10}{'least':>10}{'most':>10}")
    for name, rates in (
        (f"shards.pack, {workers} workers", ours),
        ("ShardWriter, 1 process", theirs),
    ):
        print(f"{name:34}{median(rates):>10.0f}{min(rates):>10.0f}{max(rates):>10.0f}")
    print(f"ratio {ours_median / theirs_median:.2f}; peak RSS of all processes "
          f"{max(peaks) / 2**20:.0f} MiB")  # fmt: skip
    return {
        "images": images,
        "workers": workers,
        "images_per_s": ours_median,
        "shardwriter_images_per_s": theirs_median,
        "ratio": ours_median / theirs_median,
        "peak_rss_bytes": max(peaks),
    }


def _pack_ours(source: Path, out: Path, images: int, size: int, workers: int) -> tuple[float, int]:
    """Images/s of the documented command, and the most memory that its processes held together."""
    command = [sys.executable, "-m", "shards.pack", "affectnet", "--source", str(source), "--out",
               str(out), "--size", str(size), "--workers", str(workers)]  # fmt: skip
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
    return rate, peak_bytes


def _pack_with_shardwriter(source: Path, out: Path, size: int) -> float:
    """Images/s of webdataset's own writer, fed with the same samples by this process."""
    logging.disable(logging.WARNING)
    out.mkdir()
    began = time.perf_counter()
    release = affectnet.release(source, size=size, margin=0.0)
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
    return rate


def saving(path: str, steps: int) -> dict[str, float]:
    """The share of an epoch that its checkpoint and its journal take from training.

    A checkpoint costs the copy that training waits for and what it slows the steps that run while
    it is written; the journal a flushed line each `train.log_every` steps.
    """
    config = load_config(path)
    world = init_world(config.train.device)
    parts.make_synthetic(config)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        shards = open_shardset(config.data.shards)
        split = shards.split("train")
        engine = parts.build_engine(
            config, world, parts.build_objective(config, shards, is_new=True)
        )
        stream = parts.open_train_stream(config, world, shards, split, start=0)
        writer = checkpoint.Writer(output, keep=1, stop_on_error=True)
        journal = Journal(output)
        quiet: list[float] = []
        busy: list[float] = []
        blocked: list[float] = []
        for step in range(steps):
            writing, began = writer.is_writing, time.perf_counter()
            result = engine.train_step(
                next(stream), lr=config.optim.lr, votes=Votes(False, False, 0)
            )
            result.losses.tolist()  # waits for a GPU
            if step > 10:  # the first ones are warming up
                (busy if writing else quiet).append(time.perf_counter() - began)
            if step > 10 and step % 20 == 0:
                began = time.perf_counter()
                state = {**train.FRESH, "step": step}
                content = {**train.describe(config, shards, state, None), **engine.state()}
                writer.write(step, content, is_best=True)
                blocked.append(time.perf_counter() - began)
        writer.close()
        stream.close()
        lines: list[float] = []
        for step in range(50):
            began = time.perf_counter()
            journal.append("metrics", values=dict.fromkeys("abcdefghij", 0.5), step=step)
            lines.append(time.perf_counter() - began)
        journal.close()
    step_s, epoch_steps = median(quiet), len(split) // config.train.global_batch
    slowed_s = max(sum(busy) - len(busy) * step_s, 0) / len(blocked)
    checkpoint_s = sum(blocked) / len(blocked) + slowed_s
    journal_s = median(lines) * epoch_steps / config.train.log_every
    share = (checkpoint_s + journal_s) / (epoch_steps * step_s)
    print(f"a step takes {1e3 * step_s:.0f} ms; for a checkpoint, training waits "
          f"{1e3 * median(blocked):.0f} ms, and the steps while it is written take "
          f"{1e3 * slowed_s:.0f} ms more; a line of the journal {1e3 * median(lines):.1f} ms\n"
          f"together {100 * share:.2f} % of an epoch of {epoch_steps} steps")  # fmt: skip
    return {"step_s": step_s, "checkpoint_s": checkpoint_s, "journal_s": journal_s, "share": share}


def engines(path: str, steps: int, ranks: list[int]) -> dict[str, Any]:
    """The loss curve of each engine, stage and number of ranks beside that of DDP on one rank.

    At a learning rate of 1e-6: at the recipes' own, a difference in the last bit soon is one in the
    first (see the README on chaos).
    """
    rows: dict[str, dict[str, float]] = {}
    first: list[float] = []
    print("| engine | ranks | final loss | largest difference | seconds |\n|---|---|---|---|---|")
    kinds = {"DDP": ["engine.name=ddp"]} | {
        f"ZeRO {stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"]
        for stage in range(4)
    }
    for size in ranks:
        for name, options in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                losses, seconds = _curve(path, steps, size, Path(folder), options)
            first = first or losses
            worst = max(abs(a - b) for a, b in zip(losses, first, strict=True))
            print(
                f"| {name} | {size} | {losses[-1]:.5f} | {worst:.1e} | {seconds:.1f} |", flush=True
            )
            rows[f"{name}, {size} ranks"] = {
                "final_loss": losses[-1], "largest_difference": worst, "seconds": seconds
            }  # fmt: skip
    return rows


def _curve(
    path: str, steps: int, ranks: int, output: Path, options: list[str]
) -> tuple[list[float], float]:
    """The loss of every step of a training, from its journal, and the seconds it took in all."""
    script = Path(__file__).parent / "train.py"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", str(script), path, f"train.max_steps={steps}",
        "train.log_every=1", "optim.lr=1e-6", f"train.output={output}", *options,
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output}/mlflow.db"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    values = [line["values"] for line in lines if line["kind"] == "metrics"]
    return [v["train/loss"] for v in values if "train/loss" in v], seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
