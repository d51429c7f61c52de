"""All ranks are seen: who holds the others up is named, once an epoch."""

import functools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conftest import ALONE, call_program, launch, single
from dan_dist.data import loader
from dan_dist.data.loader import Batch, Loader
from dan_dist.data.reader import Reader
from dan_dist.distributed.world import World
from dan_dist.pace import Pace

Write = Callable[[str], Path]
THREE = World(0, 0, 3, 3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("owns", "late"),
    [
        ([0.1, 0.1, 0.1], []),
        ([0.1, 0.35, 0.1], [1]),  # a quarter of a step of 1 s later
        ([0.1, 0.25, 0.1], []),  # less than a fifth
        ([0.5, 0.1, 0.5], []),  # most are as late: no rank holds the others up
        ([0.4, 0.1, 0.1], [0]),
    ],
)
def test_a_rank_is_late_by_a_fifth_of_a_step(owns: list[float], late: list[int]) -> None:
    pace = Pace(THREE)
    for _ in range(3):
        pace.add([0.0] * 3 + owns, 1.0)
    assert [rank for rank, _, _ in pace.late_ranks()] == late
    found = pace.metrics(3.0)
    assert found["train/own_s_least"] == pytest.approx(min(owns))
    assert found["train/own_s_most"] == pytest.approx(max(owns))
    assert found["train/own_s_mean"] == pytest.approx(np.mean(owns))
    assert found["train/slowest_rank"] == owns.index(max(owns))
    assert not pace.late_ranks()  # another epoch


def test_batches_that_come_in_bursts_hide_no_slow_rank() -> None:
    """Four threads read for rank 1: it waits long for every fourth batch, and not for the rest."""
    pace = Pace(THREE)
    for step in range(50):
        wait_s = 1.6 if step % 4 == 0 else 0.0
        pace.add([0.0] * 3 + [0.1, 0.1 + wait_s, 0.1], 0.5 + wait_s)
    ((rank, late_s, steps),) = pace.late_ranks()
    assert rank == 1 and late_s == pytest.approx(0.4, abs=0.05) and steps == 50


def test_steps_that_are_traced_are_not_timed(tiny: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[float | None] = []
    monkeypatch.setattr(Pace, "add", lambda self, times, step_s: timed.append(step_s))
    single(tiny("run"), "train.max_steps=8", "train.profile=3")
    traced = 8 - len(timed)
    assert 3 <= traced < 8


def test_one_long_step_names_nobody() -> None:
    pace = Pace(THREE)
    pace.add([0, 0, 0, 9.0, 0.1, 0.1], 10.0)
    for _ in range(4):
        pace.add([0, 0, 0, 0.1, 0.1, 0.1], 1.0)
    pace.add([0, 0, 0, 9.0, 0.1, 0.1], None)  # an evaluation in between
    assert not pace.late_ranks()
    alone = Pace(ALONE)
    alone.add([0.5, 0.6], 1.0)
    assert not alone.late_ranks() and alone.metrics(1.0)["train/wait_share_max"] == 0.5


def train_slowly(program: str, words: list[str]) -> None:
    """Trains; the disk of rank 1 takes twice as long for a batch as its steps compute."""
    read, take = Reader.read_all, Loader.__next__
    ended_s, busy_s = 0.0, 1.0

    def watched(batches: Loader) -> Batch:
        nonlocal ended_s, busy_s
        if batches.augment is None:
            return take(batches)
        busy_s = time.perf_counter() - ended_s if ended_s else busy_s
        batch = take(batches)
        ended_s = time.perf_counter()
        return batch

    def slow(reader: Reader, samples: list[int]) -> list[NDArray[np.uint8]]:
        if reader.split.name == "train":
            time.sleep(min(5.0, 2 * busy_s))
        return read(reader, samples)

    if os.environ["RANK"] == "1":
        Loader.__next__ = watched  # type: ignore[method-assign]
        Reader.read_all = slow  # type: ignore[method-assign]
        loader.READERS = 1  # four of them would read as fast as it trains
    call_program(program, words)


@pytest.mark.slow
def test_a_slow_reader_is_named_with_its_node(tiny: Write, tmp_path: Path, store: str) -> None:
    inside = functools.partial(train_slowly)
    words = [tiny("run"), "tracking.enabled=true", "train.log_every=5", "train.epochs=1"]
    done = launch("train", 2, *words, cwd=tmp_path, inside=inside)
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"rank 1 on \S+ holds the others up: \d+\.\d+ s a step", done.stdout)
    assert "rank 0 on" not in done.stdout and "(rank 1: " in done.stdout, line
    records = map(json.loads, (tmp_path / "run" / "journal.jsonl").read_text().splitlines())
    last = [r["values"] for r in records if "train/loss" in r.get("values", ())][-1]
    assert last["train/wait_share_max"] > 0.2 and last["train/wait_share"] < 0.2
    assert last["train/slowest_rank"] == 1
    assert last["train/own_s_most"] > 2 * last["train/own_s_least"]
