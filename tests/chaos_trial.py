"""One fault that needs no training of its own: an input is spoiled, and a program is given it.

It holds where the program's result is right, or where it refuses the input by a documented error
in one line that names it; within TRIAL_S seconds and TRIAL_BYTES of memory more than before.
"""

import faulthandler
import io
import json
import math
import random
import re
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from trees import digests

from conftest import TINY, single
from dan_dist.inference import predict
from dan_dist.options import PredictOptions
from shards.command import words
from shards.format import ShardSet, open_shardset
from shards.packing.writer import pack
from shards.releases import synthetic

TRIAL_S = 60
TRIAL_BYTES = 3 * 2**30
HARD_S = 3 * TRIAL_S  # what hangs beyond Python's reach ends the command, with all stacks
STEPS = 10  # of the run whose checkpoints are spoiled


class TooLong(BaseException):
    """No `except Exception` of a library may keep it."""


class Material(NamedTuple):
    """What is spoiled: made once, never changed."""

    folder: Path
    shards: ShardSet
    images: list[bytes]  # of the shards' validation split
    config: Path
    run: Path  # of a finished training of ten steps, with checkpoints of 4, 8 and 10

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each file of the shards."""
        return digests(self.shards.root)


def make_material(folder: Path) -> Material:
    faces = synthetic.release(80, 16, size=32, seed=7)
    pack(faces, folder / "set", size=32, shard_size=20, workers=1)
    shards = open_shardset(folder / "set")
    split = shards.split("val")
    config = folder / "run.yaml"
    config.write_text(TINY.format(shards=shards.root, output=folder / "run"))
    single(config, f"train.max_steps={STEPS}", "train.checkpoint_every=4",
           "train.keep_checkpoints=3")  # fmt: skip
    images = [split.encoded(k) for k in range(len(split))]
    return Material(folder, shards, images, config, folder / "run")


@dataclass
class Trial:
    """One fault: what it is made of, and what is known of it."""

    dice: random.Random
    material: Material
    folder: Path  # of its own
    named: list[str] = field(default_factory=list)  # one of these stands in a refusal
    done: list[str] = field(default_factory=list)  # what was spoiled, and how

    def check_refusal(self, error: BaseException) -> None:
        """Whether an error is one of the documented ones."""
        line = words(error)
        assert "\n" not in str(error) and line.isprintable(), f"not one line: {error!r}"
        assert re.search(r"[a-z]{2} ", line) or ": " in line, f"no words: {error!r}"
        assert any(name in line for name in self.named), f"names nothing of {self.named}: {line}"


Kind = Callable[[Trial], None]


def judge(kind: Kind, material: Material, seed: str) -> tuple[bool, str]:
    """Whether a fault is held, and what was done, with the reason where it is not."""
    with tempfile.TemporaryDirectory(prefix="trial-", dir=material.folder) as folder:
        trial = Trial(random.Random(seed), material, Path(folder), [folder])
        try:
            with bounded():
                try:
                    kind(trial)
                except (ValueError, OSError, FloatingPointError) as error:
                    try:
                        trial.check_refusal(error)
                    except AssertionError as fault:
                        raise fault from error
        except (Exception, TooLong):
            return False, "; ".join([*trial.done, traceback.format_exc()])
    return True, "; ".join(trial.done)


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds the time and the memory of the block; all of it is one AssertionError or TooLong."""

    def late(*_: object) -> None:
        raise TooLong(f"more than {TRIAL_S} s")

    old = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(TRIAL_S)
    faulthandler.dump_traceback_later(HARD_S, exit=True)
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    resource.setrlimit(resource.RLIMIT_DATA, (process.memory_info().data + 2 * TRIAL_BYTES, old[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    try:
        yield
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert peak is not None
        more = 1024 * int(peak[1]) - before
        assert more < TRIAL_BYTES, f"{more:,} bytes of memory more than before"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, old)


def predicted(checkpoint: Path, images: Path) -> list[dict[str, Any]]:
    """The lines of `predict --json`, each of which is a right one or an error with its reason."""
    out, errors = io.StringIO(), io.StringIO()
    options = PredictOptions(checkpoint=checkpoint, images=(images,), device="cpu", json=True)
    with redirect_stdout(out), redirect_stderr(errors):
        predict.main(options)
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.getvalue().splitlines()]
    for row in rows:
        if "error" in row:
            assert row["error"] and row["error"].isprintable(), row
            continue
        values = row["probabilities"].values()
        assert all(map(math.isfinite, values)) and abs(sum(values) - 1) < 1e-3, row
        assert row["class"] in row["probabilities"], row
    assert "Traceback" not in errors.getvalue(), errors.getvalue()
    return rows


def set_copy(trial: Trial) -> Path:
    """The trial's own copy of the shards."""
    return Path(shutil.copytree(trial.material.shards.root, trial.folder / "set"))
