"""From the command to the first step of a training."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from benchmarks.measure import LAUNCH, Measure, Table, in_turn, show
from dan_dist.config import layered

# Lines of a training's log, in their order, by what has been done by then
LINES = {
    "device found, s": "device: ",
    "data opened, s": "data: ",
    "start evaluated, s": "at the start: ",
    "step 1, s": " step 1 ",
}


def run(path: str, overrides: list[str], folder: Path, *, repeats: int) -> Table:
    """Seconds until the first step has been made, its shards being there, files being cached.

    folder: for the runs.
    """

    def launch(*launcher: str) -> Measure:
        """One training of one step, up to its log line."""
        output = folder / "run"
        own = [f"train.output={output}", "train.max_steps=1", "train.log_every=1",
               "train.resume=auto"]  # fmt: skip
        command = [*launcher, str(LAUNCH / "train.py"), path, *layered(overrides, own)]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        shutil.rmtree(output, ignore_errors=True)
        began_s = perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            lines: list[str] = []
            seen: Measure = {}
            for line in process.stdout:
                lines.append(line)
                for name, words in LINES.items():
                    if words in line:
                        seen.setdefault(name, perf_counter() - began_s)
            if process.wait():
                raise RuntimeError(f"{' '.join(command)}\n{''.join(lines)}")
        return {**seen, "s": seen["step 1, s"], "to the end, s": perf_counter() - began_s}

    def start(modules: str) -> Measure:
        """A process that does nothing but import."""
        began_s = perf_counter()
        command = [sys.executable, "-c", f"import {modules}"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(LAUNCH.parent)})
        seconds = perf_counter() - began_s
        return {"s": seconds, "to the end, s": seconds}

    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    forms: dict[str, Callable[[], Measure]] = {
        "of that: import torch": lambda: start("torch"),
        "and import nvidia.dali": lambda: start("torch, nvidia.dali"),
        "and import dan_dist.train": lambda: start("dan_dist.train"),
        "and what an optimiser imports": lambda: start("dan_dist.train, torch._dynamo"),
        "torchrun launch/train.py": lambda: launch(*launcher),
        "python launch/train.py": lambda: launch(sys.executable),
    }
    launch(sys.executable)  # draws the shards, fills the file cache
    table = in_turn(forms, repeats, "start")
    show(f"From launch to the first step, {path}", table, {"s": ".1f", "to the end, s": ".1f"}, {})
    launches = {name: rows for name, rows in table.items() if LINES.keys() <= rows[0].keys()}
    show("Of that, up to a line of the log", launches, dict.fromkeys(LINES, ".1f"), {})
    return table
