"""More ranks on this machine, measured, and more machines, by arithmetic."""

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import torchrun
from dan_dist.distributed.cores import core_count
from dan_dist.distributed.world import World

NODES = (2, 4, 8, 16)


def run(
    path: str, overrides: list[str], world: World, *, ranks: list[int] | None,
    gradient_bytes: int, batch: int, steps: int,
    repeats: int, link_gb_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Prints and returns images/s of 1 … N ranks with `batch` images each (weak scaling).

    A rank has the same share of the cores however many there are, one alone too. gradient_bytes:
    of all weights.
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
    return {
        "images_per_s": rates,
        "arithmetic": _arithmetic(step_s, link_gb_s, gradient_bytes),
    }


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


def _arithmetic(step_s: float, link_gb_s: float, gradient_bytes: int) -> dict[int, float]:
    """Shares of linear that a ring's sum of the gradients leaves, beside the step, not hidden.

    DDP sends while the backward pass goes on, so that what is left of it is less.
    """
    sent_bytes = {n: 2 * (n - 1) / n * gradient_bytes for n in NODES}
    shares = {n: step_s / (step_s + sent / (1e9 * link_gb_s)) for n, sent in sent_bytes.items()}
    text = ", ".join(f"{n} nodes {100 * share:.1f} %" for n, share in shares.items())
    print(f"By arithmetic, not measured: gradients, {sent_bytes[NODES[-1]] / 1e6:.0f} MB sent by "
          f"each of {NODES[-1]} nodes over {link_gb_s:g} GB/s against a step of "
          f"{1e3 * step_s:.0f} ms, leave, of linear, at least: {text}")  # fmt: skip
    return shares
