"""More ranks on this machine, measured, and more machines, by arithmetic."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import torchrun
from dan_dist.model import CHANNELS
from dan_dist.world import World, core_count

NODES = (2, 4, 8, 16)


def run(
    path: str, overrides: list[str], world: World, *, ranks: list[int] | None,
    gradient_bytes: int, classes: int, batch: int,
    steps: int, repeats: int, link_gb_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Prints and returns images/s of 1 … N ranks with `batch` images each (weak scaling).

    A rank has the same share of the cores however many there are, one alone too. gradient_bytes:
    of all weights, those of the classifier over `classes` among them.
    """
    places = torch.cuda.device_count() if world.device.type == "cuda" else core_count()
    sizes = ranks or [n for n in (1, 2, 4, 8, 16) if n <= places]
    rates: dict[int, list[float]] = {}
    print(f"\nScaling, {batch} images a rank\n\n| ranks | images/s | of linear |\n|---|---|---|")
    for size in sizes:
        threads = max(1, core_count() // max(sizes))
        rates[size] = _train(path, overrides, size, batch, steps, repeats, threads)
        linear = median(rates[size]) / median(rates[sizes[0]]) * sizes[0] / size
        spread = f"{median(rates[size]):.1f} ({min(rates[size]):.1f} to {max(rates[size]):.1f})"
        print(f"| {size} | {spread} | {100 * linear:.1f} % |", flush=True)
    largest = sizes[-1]
    step_s = largest * batch / median(rates[largest])
    whole = _arithmetic(step_s, link_gb_s, "gradients", lambda n: _ring(n, gradient_bytes))
    figures = {"images_per_s": rates, "arithmetic": whole}
    classifier_bytes = 4 * CHANNELS * classes
    if classifier_bytes > gradient_bytes / 2:
        features_bytes = 4 * CHANNELS * largest * batch
        figures["sharded"] = _arithmetic(
            step_s, link_gb_s, f"gradients and features, if each rank held a part of the "
            f"classifier's {classifier_bytes / 1e6:.0f} MB alone",
            lambda n: _ring(n, gradient_bytes - classifier_bytes + n * features_bytes),
        )  # fmt: skip
    return figures


def _train(
    path: str, overrides: list[str], ranks: int, batch: int, steps: int, repeats: int, threads: int
) -> list[float]:
    """Images/s, end to end, of every repeat of a training on that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        torchrun(
            ranks, "bench.py", "train", path, *overrides, f"data.threads={threads}",
            "--batch", str(batch), "--steps", str(steps), "--repeats", str(repeats),
            "--json", str(found), OMP_NUM_THREADS=str(threads),
        )  # fmt: skip
        rows = json.loads(found.read_text())["train"]["table"]["end to end"]
    return [row["images/s"] for row in rows]


def _ring(nodes: int, moved_bytes: float) -> float:
    """What each node of a ring sends where all nodes sum, or gather and scatter, so many bytes.

    A classifier in parts is computed where its rows are: features of the global batch are gathered
    by all nodes, their gradients summed and scattered, and its own gradients stay. That is as much
    as a sum over the features, which is less than one over the classifier while a global batch has
    fewer images than there are classes. It would take a second kind of parallelism, with its own
    softmax, optimiser and checkpoints.
    """
    return 2 * (nodes - 1) / nodes * moved_bytes


def _arithmetic(
    step_s: float, link_gb_s: float, what: str, sent_bytes: Callable[[int], float]
) -> dict[int, float]:
    """What nodes need for a step's communication, beside the step, not hidden at all.

    DDP sends while the backward pass goes on, so that what is left of it is less.
    """
    sends_s = {n: sent_bytes(n) / (1e9 * link_gb_s) for n in NODES}
    shares = {n: step_s / (step_s + send_s) for n, send_s in sends_s.items()}
    told = ", ".join(f"{n} nodes {100 * share:.1f} %" for n, share in shares.items())
    print(f"By arithmetic, not measured: {what}, {sent_bytes(NODES[-1]) / 1e6:.0f} MB sent by each "
          f"of {NODES[-1]} nodes over {link_gb_s:g} GB/s against a step of {1e3 * step_s:.0f} ms, "
          f"leave, of linear, at least: {told}")  # fmt: skip
    return shares
