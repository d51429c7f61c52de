"""How everything here is measured: contenders in turn, medians, spreads, ratios within a round.

Machines are noisy, shared ones most of all. What else they do falls on all contenders alike where
these take turns, and CPU time an image is steadier than images a second.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

Measure = dict[str, float]  # what one repeat gave
Table = dict[str, list[Measure]]  # contender → its repeats

LAUNCH = Path(__file__).parent.parent
WARM_BATCHES = 12  # more than any contender holds ready
LOOK_S, AT_REST = 0.25, 0.2  # how long, and the share of a core below which nothing is under way
REST_S = 60.0  # that is waited for it


def in_turn(contenders: Mapping[str, Callable[[], Measure]], repeats: int, title: str) -> Table:
    """Every contender once a round, `repeats` rounds."""
    table: Table = {name: [] for name in contenders}
    with tqdm(total=repeats * len(contenders), desc=title, leave=False, disable=None) as bar:
        for _ in range(repeats):
            for name, contend in contenders.items():
                wait_for_rest()
                table[name].append(contend())
                bar.update()
    return table


def wait_for_rest() -> None:
    """Until the threads and processes of all contenders have filled their queues.

    Those of the one before would take cores from the next one, and their CPU time is counted too.
    """
    end_s, before = perf_counter() + REST_S, cpu_s()
    while perf_counter() < end_s:
        sleep(LOOK_S)
        now = cpu_s()
        if now - before < AT_REST * LOOK_S:
            return
        before = now


def middle(table: Table, name: str, measure: str) -> float:
    """The median over the repeats of one contender."""
    return median(row[measure] for row in table[name])


def ratio(table: Table, name: str, peer: str, measure: str) -> float:
    """The median of the ratios to `peer`, each within one round."""
    pairs = zip(table[name], table[peer], strict=True)
    return median(own[measure] / other[measure] for own, other in pairs)


def show(title: str, table: Table, columns: Mapping[str, str], ratios: Mapping[str, str]) -> None:
    """Prints a Markdown table: medians (least to most) and ratios.

    columns: measure → format. ratios: measure → the contender that the others are divided by.
    """
    heads = [*columns, *(f"{measure} ÷ {peer}" for measure, peer in ratios.items())]
    print(f"\n{title}\n\n| {' | '.join(['', *heads])} |\n|{'---|' * (len(heads) + 1)}")
    for name, rows in table.items():
        cells = [name]
        for measure, form in columns.items():
            values = [row[measure] for row in rows]
            low, high = format(min(values), form), format(max(values), form)
            spread = f" ({low} to {high})" if low != high else ""
            cells.append(f"{format(median(values), form)}{spread}")
        cells += [f"{ratio(table, name, peer, m):.2f}" for m, peer in ratios.items()]
        print(f"| {' | '.join(cells)} |", flush=True)


def consume(batches: Iterator[Tensor], images: int, device: torch.device) -> Measure:
    """The speed of a loader: `images` images of it, in its stride, on the device."""
    for _ in range(WARM_BATCHES):
        next(batches)
    wait_for(device)
    began_s, cpu_began_s, seen = perf_counter(), cpu_s(), 0
    while seen < images:
        seen += len(next(batches))
    wait_for(device)
    seconds, cpu = perf_counter() - began_s, cpu_s() - cpu_began_s
    return {"images/s": seen / seconds, "CPU-ms an image": 1e3 * cpu / seen}


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def torchrun(ranks: int, script: str, *arguments: str, **environment: str) -> None:
    """Runs a program of launch/ on so many ranks, to its end, in silence.

    Raises:
        RuntimeError: it failed; with all its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={ranks}", str(LAUNCH / script), *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def cpu_s() -> float:
    """CPU seconds of this process and its children up to now; the children's in whole ticks."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    # The process's own in nanoseconds: a few images take no whole tick, and ratios need a divisor.
    return process_time() + float(sum(t.user + t.system for t in times))
