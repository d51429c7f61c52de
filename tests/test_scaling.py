"""What is projected for many GPUs, by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))

from benchmarks.projection import (
    Links,
    Parts,
    batches,
    exchange_s,
    project,
    show_projection,
    tables,
)

LINKS = Links(ranks_a_node=8, inside_gb_s=100, between_gb_s=50, inside_s=1e-5, between_s=3e-5)
STEPS = {256: 20e-3, 32: 5e-3, 16: 4e-3, 4: 3e-3}
PARTS = Parts(STEPS, 20_000.0, 2, 80_000_000, 41, LINKS)


def test_what_ranks_exchange() -> None:
    messages = 4 + 2 * 41  # buckets of 25 MiB, statistics forward and backward
    inside = 2 * 7 / 8 * 80e6 / 100e9
    assert exchange_s(PARTS, 1) == 0
    assert exchange_s(PARTS, 8) == pytest.approx(inside + messages * 1e-5)
    between = 2 * 7 / 8 * 80e6 / 50e9  # eight nodes
    assert exchange_s(PARTS, 64) == pytest.approx(inside + between + messages * 4e-5)


def test_strong_and_weak() -> None:
    assert batches(256) == [256, 32, 16, 4]
    found = tables(PARTS, 256)
    assert [(row.ranks, row.images) for row in found["strong"]] == [
        (1, 256),
        (8, 32),
        (16, 16),
        (64, 4),
    ]
    assert [row.images for row in found["weak"]] == [256] * 4
    alone = found["weak"][0]
    assert alone.efficiency == 1 and alone.images_s == pytest.approx(256 / 20e-3)
    eight = found["strong"][1]
    assert eight.step_s == pytest.approx(5e-3 + exchange_s(PARTS, 8))
    assert eight.efficiency == pytest.approx(eight.images_s / (8 * alone.images_s))
    assert [r.efficiency for r in found["weak"]] == sorted(
        (r.efficiency for r in found["weak"]), reverse=True
    )
    assert [
        row.ranks for row in tables(Parts({32: 5e-3, 4: 3e-3, 2: 3e-3}, 1e5, 1, 1, 1), 32)["strong"]
    ] == [1, 8, 16]  # two images at least


def test_the_loader_can_be_the_slower_one() -> None:
    slow = Parts(STEPS, 6_400.0, 2, 80_000_000, 41, LINKS)
    found = project(slow, 64, 256)
    assert found.step_s == pytest.approx(40e-3) and found.efficiency == 1  # of what one can do


def test_it_names_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show_projection(PARTS, tables(PARTS, 256))
    text = capsys.readouterr().out
    assert "| 64 | 4 |" in text and "strong" in text and "weak" in text
    measured, rest = text.split("Measured here: ")[1].split("Not measured: ")
    assert (
        "256: 20.0 ms" in measured and "20000 images/s" in measured and "41 BatchNorms" in measured
    )
    assert "on 2 threads, this machine's cores ÷ 8 ranks of a node" in measured
    assert "50 GB/s between nodes" in rest and "BatchNorm over ranks" in rest
