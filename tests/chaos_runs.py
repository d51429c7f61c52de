"""Trainings that tests/chaos.py and tests/test_slurm.py disturb, and how they are followed."""

import os
import random
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from mlflow_server import Server

from dan_dist.run.outcome import OUTCOME

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCH = 10  # steps
ATTEMPT_S = 180.0  # hard limit of anything that is waited for
DAN = ["model.heads=2", "loss.fcn=affinity", "loss.afn=partition"]
IDENTITY = ["task=identity", "model.heads=0", "loss.fcn=none", "loss.afn=none", "data.pairs=60",
            "loss.classification=arcface", "data.sampling=shuffle"]  # fmt: skip
TASKS = {"expression": DAN, "identity": IDENTITY}
EXACT = ["optim.name=adam", "optim.lr=1e-3", "train.precision=float32"]  # bit for bit
ELASTIC = ["optim.lr=1e-7", "optim.momentum=0.0", "train.precision=float64"]  # see tests/README.md
CONFIG = """
data: {{shards: {shards}, max_bad_images: 0, augment: {{affine_p: 0.7, degrees: 20,
  scale: [0.8, 1.0], translate: 0.2, erase_p: 0.5}}}}
model: {{image_size: 32}}
train: {{epochs: {epochs}, global_batch: 8, device: cpu, log_every: 1, checkpoint_every: 7,
  keep_checkpoints: 3, timeout_s: 20, output: {output}}}
tracking: {{experiment: chaos}}
"""


class Attempt:
    """One start of the documented command, followed by what it prints."""

    def __init__(self, config: Path, ranks: int, options: list[str], uri: str) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = str(REPOSITORY / "launch" / "train.py")
        self.ranks, self.family = ranks, list[psutil.Process]()
        self.log = config.with_suffix(f".{time.time_ns()}.log")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": uri,
                       "OMP_NUM_THREADS": "1"}  # fmt: skip
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*torchrun, f"--nproc-per-node={ranks}", script, str(config), *options],
                stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=config.parent,
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def step(self) -> int:
        """The last step that the log holds."""
        return int((re.findall(r" step (\d+) loss", self.text) or ["0"])[-1])

    @property
    def resumed(self) -> int:
        found = re.search(r"resumed after step (\d+)", self.text)
        return int(found[1]) if found else 0

    def reach(self, step: int) -> bool:
        """Waits for a step; False if the process ended before."""
        deadline = time.monotonic() + ATTEMPT_S
        while self.step < step:
            if self.process.poll() is not None:
                return False
            if len(self.family) < self.ranks:
                with suppress(psutil.NoSuchProcess):
                    self.family = psutil.Process(self.process.pid).children()
            assert time.monotonic() < deadline, f"stuck before step {step}:\n{self.text}"
            time.sleep(0.02)
        return True

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.family if p.is_running()] or [psutil.Process(self.process.pid)]

    def end(self) -> int:
        """Waits for the end, after which nothing of it may be left; returns the exit code."""
        try:
            code = self.process.wait(ATTEMPT_S)
        finally:
            left = self.family  # torchrun's workers have sessions of their own
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and any(p.is_running() for p in left):
                time.sleep(0.05)
            stayed = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            for process in stayed:
                process.kill()
        assert not stayed, f"left behind: {stayed}\n{self.text}"
        return code


@dataclass
class Campaign:
    """One run that is disturbed until it has got to its end."""

    folder: Path
    config: Path
    options: list[str]
    uri: str
    dice: random.Random
    epochs: int
    server: Server | None = None
    reached: int = 0  # the furthest step so far
    owed: list[tuple[str, int, float]] = field(default_factory=list)  # fault, step, when

    @property
    def output(self) -> Path:
        return self.config.with_suffix("")

    @property
    def total(self) -> int:
        """Steps of the run."""
        return EPOCH * self.epochs

    def start(self, ranks: int = 2) -> Attempt:
        return Attempt(self.config, ranks, self.options, self.uri)

    def somewhere(self) -> int:
        """A step a little further on."""
        return min(self.reached + self.dice.randint(1, 10), self.total - 1)

    def outcome(self) -> str:
        path = self.output / OUTCOME
        return path.read_text() if path.is_file() else ""
