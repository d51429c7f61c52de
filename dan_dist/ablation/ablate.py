"""The story of an ablation: a grid, the training of its missing runs, the comparison."""

from pathlib import Path

import torch

from dan_dist.ablation import comparison, grid
from dan_dist.ablation.runs import read_summary, train_missing
from dan_dist.config import load_config
from dan_dist.options import AblateOptions
from dan_dist.run.signals import PREEMPTED, StopRequest
from dan_dist.tracking.store import page, store
from shards.command import FAILED
from shards.files import locked


def main(options: AblateOptions, stop: StopRequest) -> int:
    """Trains and compares; returns the exit code.

    Raises:
        ValueError, OSError: bad input, in one line.
    """
    name, axes, overrides = grid.parse(options.words)
    folder = options.output or Path("runs") / name
    folds = options.folds or 0
    runs = grid.grid_runs(options.config, axes, overrides, options.seeds, folder, name, folds)
    if options.child is not None:
        if not 0 <= options.child < len(runs):
            raise ValueError(f"--child is {options.child}, the grid has runs 0 to {len(runs) - 1}")
        print("\n".join(runs[options.child].overrides))
        return 0
    if not (options.list or options.summary):
        with locked(folder / "training.lock", f"another process works on {folder} (training)"):
            ranks = options.nproc or max(1, torch.cuda.device_count())
            train_missing(options.config, runs, folder, ranks, stop)
            stop.wait_for_step = False
    configs = [load_config(options.config, run.overrides) for run in runs]
    summaries = [read_summary(run, c) for run, c in zip(runs, configs, strict=True)]
    if options.list:
        for number, r in enumerate(summaries):
            print(f"{number:4} {r.run.name:40} {r.status}{': ' + r.reason if r.reason else ''}")
        return 0
    if stop.signal:
        print(f"{stop.signal}: stopped; the same command resumes")
        if not any(r.status == "finished" for r in summaries):
            return PREEMPTED
    parent = grid.ablation_id(folder, name)
    taken = f"another process works on {folder} (comparison)"
    with locked(folder / "comparison.lock", taken, wait=True):  # the last of several sees all
        summaries = [read_summary(run, c) for run, c in zip(runs, configs, strict=True)]
        experiment = configs[0].tracking.experiment
        lines = comparison.publish_comparison(name, parent, experiment, summaries, folder)
    print(f"tables and figures: {folder / comparison.FOLDER}")
    if not (uri := store()[0]).startswith("http"):
        print(page(uri))
    print("\n".join(lines))
    if stop.signal:
        return PREEMPTED
    return 0 if all(r.status == "finished" for r in summaries) else FAILED
