"""Trains a grid of settings and compares them:

    python launch/ablate.py heads --config configs/demo.yaml --seeds 3
    python launch/ablate.py model.heads=1,2,4 loss.fcn=center,affinity train.epochs=10

`heads` (0 to 8; the paper's figure 5), `fcn-loss` (its table 1) and `afn-loss` (table 2) are grids
that come along; any `section.key=value,value` adds an axis, any `section.key=value` holds for all.
Each run is trained under torchrun, one after another; the same command goes on where it was stopped
and trains what is missing. MLflow holds the runs under one parent, with the tables and figures.
"""

import argparse
import logging
from pathlib import Path

from dan_dist.entry import FAILED, run
from dan_dist.stop import PREEMPTED, StopRequest

log = logging.getLogger("dan_dist.ablate")


def main(arguments: list[str], stop: StopRequest) -> int:
    """Trains and compares; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="+", metavar="AXIS|section.key=value")
    parser.add_argument("--config", default="configs/demo.yaml", help="default: configs/demo.yaml")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default 1)")
    parser.add_argument("--output", type=Path, help="default: runs/NAME, after the axes")
    parser.add_argument("--nproc", type=int, help="ranks of a run (default: the GPUs, or one)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--summary", action="store_true", help="compare what there is, train nothing")
    only.add_argument("--list", action="store_true", help="say what became of each run")
    only.add_argument(
        "--child", type=int, metavar="N",
        help="print run N's overrides, one a line, for whoever trains it elsewhere (from 0)",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    for name in ("seeds", "nproc"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}, expected 1 or more")

    import torch

    from dan_dist import ablation, comparison
    from dan_dist.config import load_config
    from dan_dist.store import store

    name, axes, overrides = ablation.parse(options.words)
    folder = options.output or Path("runs") / name
    grid = ablation.children(options.config, axes, overrides, options.seeds, folder, name)
    if options.child is not None:
        if not 0 <= options.child < len(grid):
            raise ValueError(f"--child is {options.child}, the grid has runs 0 to {len(grid) - 1}")
        print("\n".join(grid[options.child].overrides))
        return 0
    configs = [load_config(options.config, child.overrides) for child in grid]
    if not (options.list or options.summary):
        with ablation.alone(folder, "training", wait=False):
            ranks = options.nproc or max(1, torch.cuda.device_count())
            ablation.train_missing(options.config, grid, folder, ranks, stop)
            stop.wait_for_step = False
    results = [ablation.read(child, c) for child, c in zip(grid, configs, strict=True)]
    if options.list:
        for number, r in enumerate(results):
            print(f"{number:4} {r.child.name:40} {r.status}{': ' + r.reason if r.reason else ''}")
        return 0
    if stop.signal:
        print(f"{stop.signal}: stopped; the same command goes on")
        if not any(r.status == "finished" for r in results):
            return PREEMPTED
    parent = ablation.identity(folder, name)
    with ablation.alone(folder, "comparison", wait=True):  # the last of several sees what all did
        results = [ablation.read(child, c) for child, c in zip(grid, configs, strict=True)]
        page = comparison.summarise(name, parent, configs[0].tracking.experiment, results, folder)
    print(f"tables and figures: {folder / comparison.FOLDER}")
    if not (uri := store()[0]).startswith("http"):
        print(f"mlflow ui --backend-store-uri {uri}")
    print(f"compare in MLflow: {page}")
    if stop.signal:
        return PREEMPTED
    return 0 if all(r.status == "finished" for r in results) else FAILED


if __name__ == "__main__":
    run(main)
