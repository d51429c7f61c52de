"""Whether programs end, again and again, on a machine that has more to do than it can.

    python tests/standing.py [--times 200] [--load 4] [--programs predict,evaluate,deepspeed]
                             [--minutes 180]

Starts each program so often, in turn, beside `--load` processes that never wait, as far as the
minutes reach. One that has not ended after 100 s stands still: its processes print the stacks of
all threads and end. Prints a table, and ends with code 1 where a program stood still or failed.
"""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

from chaos_trial import Material, make_material
from ranks import free_port

from conftest import torchrun
from shards.command import end

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
STILL_S = 100.0
STACKS_S = 10.0  # for the stacks to be printed


def predict(material: Material, folder: Path) -> list[str]:
    """Four pictures, by one process."""
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(material.images[number])
    return [
        sys.executable,
        str(LAUNCH / "predict.py"),
        str(material.run),
        str(folder),
        "--device",
        "cpu",
    ]


def evaluate(material: Material, folder: Path) -> list[str]:
    """Sixteen images, by two ranks of torchrun."""
    return [*torchrun(2), str(LAUNCH / "evaluate.py"), str(material.run), "--data",
            str(material.shards.root), "--output", str(folder / "found"), "--no-tracking",
            "--device", "cpu"]  # fmt: skip


def deepspeed(material: Material, folder: Path) -> list[str]:
    """Two steps of training, by one rank of DeepSpeed's launcher."""
    return [str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank",
            "--num_accelerators", "1", "--master_port", str(free_port()), str(LAUNCH / "train.py"),
            str(material.config), "train.max_steps=2",
            f"train.output={folder / 'run'}"]  # fmt: skip


PROGRAMS: dict[str, Callable[[Material, Path], list[str]]] = {
    program.__name__: program for program in (predict, evaluate, deepspeed)
}


def attempt(command: list[str], folder: Path) -> tuple[str, str]:
    """Runs a program; returns "", "failed" or "stood still", and what it printed."""
    environment = os.environ | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            became = "failed" if process.wait(STILL_S) else ""
        except subprocess.TimeoutExpired:
            became = "stood still"
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(STACKS_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return became, (folder / "output").read_text(errors="replace")


@contextmanager
def loaded(processes: int) -> Iterator[None]:
    """Beside so many processes that compute and never wait."""
    context = multiprocessing.get_context("fork")
    busy = [context.Process(target=_spin, daemon=True) for _ in range(processes)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        sum(range(10_000))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/standing.py", description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--load", type=int, default=4)
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--minutes", type=float, default=180, help="after which none begins")
    options = parser.parse_args()
    until_s, bad = time.monotonic() + 60 * options.minutes, 0
    times_s = defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory(prefix="standing-") as home:
        material = make_material(Path(home))
        with loaded(options.load):
            for number, name in product(range(options.times), options.programs.split(",")):
                if time.monotonic() > until_s:
                    break
                folder = Path(home) / f"{name}-{number}"
                folder.mkdir()
                began_s = time.monotonic()
                became, printed = attempt(PROGRAMS[name](material, folder), folder)
                times_s[name].append(time.monotonic() - began_s)
                if became:
                    bad += 1
                    print(f"{name} {number} {became}:\n{printed}", flush=True)
    print("| program | tried | median s | longest s |\n|---|---|---|---|")
    for name, found_s in times_s.items():
        middle_s = sorted(found_s)[len(found_s) // 2]
        print(f"| {name} | {len(found_s)} | {middle_s:.1f} | {max(found_s):.1f} |")
    print(f"{bad} of them stood still or failed")
    return int(bad > 0)


if __name__ == "__main__":
    end(main())
