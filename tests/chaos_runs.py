"""Trainings that tests/chaos.py and tests/test_slurm.py disturb, and how they are followed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from interpreter import forked
from mlflow_server import Server
from ranks import start_ranks

from conftest import SCRIPT, call_program
from dan_dist.run.outcome import OUTCOME

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCH = 10  # steps
OURS = re.compile(r'File "[^"]*/(dan_dist|shards)/[^"]*", line')  # of a traceback
ATTEMPT_S = 180.0  # hard limit of anything that is waited for
DAN = ["model.heads=2", "loss.fcn=affinity", "loss.afn=partition"]
IDENTITY = ["task=identity", "model.heads=0", "loss.fcn=none", "loss.afn=none", "data.pairs=60",
            "loss.classification=arcface", "data.sampling=shuffle"]  # fmt: skip
BASELINE = ["model.heads=0", "loss.fcn=none", "loss.afn=none"]  # the quickest
TASKS = {"baseline": BASELINE, "expression": DAN, "identity": IDENTITY}
EXACT = ["optim.name=adam", "optim.lr=1e-3", "train.precision=float32"]  # bit for bit
ELASTIC = ["optim.lr=1e-7", "optim.momentum=0.0", "train.precision=float64"]  # see tests/README.md
CONFIG = """
data: {{shards: {shards}, max_bad_images: 0, augment: {{affine_p: 0.7, degrees: 20,
  scale: [0.8, 1.0], translate: 0.2, erase_p: 0.5}}}}
model: {{image_size: 32, width: 16}}
train: {{epochs: {epochs}, global_batch: 8, device: cpu, log_every: 1, checkpoint_every: 7,
  keep_checkpoints: 3, timeout_s: 20, output: {output}}}
tracking: {{experiment: chaos}}
"""


class Attempt:
    """One start of the documented command, followed by what it prints."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.family = ranks, list[psutil.Process]()

    @property
    def text(self) -> str:
        raise NotImplementedError

    def code(self) -> int | None:
        """The exit code; None as long as it runs."""
        raise NotImplementedError

    def send(self, number: int) -> None:
        """Sends a signal to who was started: torchrun, as a scheduler does, or all ranks."""
        raise NotImplementedError

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
        deadline_s = time.monotonic() + ATTEMPT_S
        while self.step < step:
            if self.code() is not None:
                return False
            self.look()
            assert time.monotonic() < deadline_s, f"stuck before step {step}:\n{self.text}"
            time.sleep(0.02)
        self.look()
        return True

    def look(self) -> None:
        """Keeps the ranks' processes in `family`, as far as they are there."""

    def workers(self) -> list[psutil.Process]:
        """The ranks that are alive, by a thread at least.

        A killed process is a zombie as soon as its first thread has ended; it holds its locks until
        the last one has, which may be in the middle of a write.
        """
        alive = []
        for process in self.family:
            with suppress(psutil.NoSuchProcess):
                dead = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1
                if process.is_running() and not dead:
                    alive.append(process)
        return alive

    def end(self) -> int:
        """Waits for the end, after which nothing of it may be left; returns the exit code."""
        deadline_s = time.monotonic() + ATTEMPT_S
        while (code := self.code()) is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s and self.workers():
            time.sleep(0.05)
        stayed = self.workers()
        for process in stayed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert code is not None, f"no end after {ATTEMPT_S} s\n{self.text}"
        assert not stayed, f"left behind: {stayed}\n{self.text}"
        assert not OURS.search(self.text), self.text
        return code


class Launched(Attempt):
    """Ranks under torchrun."""

    def __init__(self, config: Path, ranks: int, options: list[str], uri: str) -> None:
        super().__init__(ranks)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.log = config.with_suffix(f".{time.time_ns()}.log")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": uri,
                       "OMP_NUM_THREADS": "1"}  # fmt: skip
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*torchrun, f"--nproc-per-node={ranks}", SCRIPT, str(config), *options],
                stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=config.parent,
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    def code(self) -> int | None:
        return self.process.poll()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def look(self) -> None:
        if len(self.family) < self.ranks:
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.process.pid).children()
                self.family = [child for child in children if SCRIPT in child.cmdline()]


class Forked(Attempt):
    """Ranks that are forked, which spares each the imports of the command; see `ranks.py`."""

    def __init__(self, config: Path, ranks: int, options: list[str], uri: str) -> None:
        super().__init__(ranks)
        folder = config.with_suffix(f".{time.time_ns()}.logs")
        folder.mkdir()
        os.environ["MLFLOW_TRACKING_URI"] = uri
        self.started = start_ranks(
            ranks, call_program, "train", [str(config), *options], cwd=config.parent, folder=folder
        )

    @property
    def text(self) -> str:
        logs = [path for rank in self.started for path in rank.logs]
        return "".join(path.read_text() for path in logs if path.is_file())

    def code(self) -> int | None:
        codes = [rank.process.poll() for rank in self.started]
        if any(codes):  # as torchrun, and Slurm, do it
            for rank in self.started:
                rank.send(signal.SIGTERM)
        if None in codes:
            return None
        return max(code or 0 for code in codes) or min(code or 0 for code in codes)

    def send(self, number: int) -> None:
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    def look(self) -> None:
        for rank in self.started[len(self.family) :]:
            if (pid := forked(rank.process.pid)) == rank.process.pid:
                return  # it is not forked yet
            with suppress(psutil.NoSuchProcess):
                self.family.append(psutil.Process(pid))


@dataclass
class Campaign:
    """One run that is disturbed until it has got to its end."""

    folder: Path
    config: Path
    output: Path
    options: list[str]
    uri: str
    dice: random.Random
    epochs: int
    ranks: int = 2
    disk: Path | None = None  # small, and the run's folder alone is there
    launched: float = 0.0  # the share of starts by torchrun
    server: Server | None = None
    reached: int = 0  # the furthest step so far
    faults: list[str] = field(default_factory=list)  # their kinds
    attempts: list[Attempt] = field(default_factory=list)
    owed: list[tuple[str, int, float]] = field(default_factory=list)  # fault, step, when

    @property
    def total(self) -> int:
        """Steps of the run."""
        return EPOCH * self.epochs

    def start(self, ranks: int | None = None) -> Attempt:
        kind = Launched if self.dice.random() < self.launched else Forked
        self.attempts.append(kind(self.config, ranks or self.ranks, self.options, self.uri))
        return self.attempts[-1]

    def somewhere(self) -> int:
        """A step a little further on."""
        return min(self.reached + self.dice.randint(1, 10), self.total - 1)

    def outcome(self) -> str:
        path = self.output / OUTCOME
        return path.read_text() if path.is_file() else ""
