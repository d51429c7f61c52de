"""All that is to be seen on a machine that is lent for minutes: checks first, then figures.

Each part is a process with a limit of its own, the most important first, so that none loses
another's time or figures. A folder gets each part's output and JSON, and all of it as `visit.json`
and `visit.md`.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from benchmarks.measure import LAUNCH
from dan_dist.run.signals import end_with_parent

BATCHES = [256, 32]  # images: the recipe's, and what eight GPUs see of it each
FROM_NOTHING = ("model.backbone=none", "data.classes=null", "tracking.enabled=false")
TESTS = ("test_gpu.py", "test_gpu_paths.py")
COMPILED = "compiled_training"  # the one among them that takes as long as all others


@dataclass(frozen=True)
class Part:
    """One process of a visit."""

    name: str
    command: list[str]
    share: float  # of the minutes
    writes: Path | None = None  # figures as JSON


def parts(folder: Path, words: list[str], batches: list[int]) -> list[Part]:
    """What is run, the most important first.

    words: the configuration and overrides of its keys. batches: images of a step.
    """
    bench = [sys.executable, str(LAUNCH / "bench.py")]

    def measured(name: str, share: float, *options: str, n: int = batches[0]) -> Part:
        found = folder / f"{name.replace(' ', '-')}.json"
        command = [*bench, *options, *words, "--batch", str(n), "--json", str(found)]
        return Part(name, command, share, found)

    tests = [str(LAUNCH.parent / "tests" / name) for name in TESTS]
    # Without the plugins and options of the project, which need not be installed there
    checks = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-o", "addopts=", "-o",
              "cache_dir=" + str(folder / "pytest"), "-k"]  # fmt: skip
    return [
        Part("checks", [*checks, f"not {COMPILED}", *tests], 0.15),
        *(measured(f"step {n}", 0.12, "step", "--repeats", "3", n=n) for n in batches),
        measured("train", 0.1, "train", "--repeats", "3"),
        measured("loader", 0.12, "loader", "--repeats", "2", "--images", "2048"),
        Part("compiled and resumed", [*checks, COMPILED, tests[0]], 0.09),
        *(measured(f"step {n} compiled", 0.08, "step", "--tried", "--repeats", "2", n=n)
          for n in batches),
        measured("train compiled", 0.08, "train", "--repeats", "2", "train.compile=true"),
        measured("start", 0.05, "start", "--repeats", "1", *FROM_NOTHING),
    ]  # fmt: skip


def run(folder: Path, chosen: list[Part], *, minutes: float) -> dict[str, Any]:
    """Runs the parts; returns what visit.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    ends_s = perf_counter() + 60 * minutes
    found: dict[str, Any] = {}
    for part in tqdm(chosen, desc="visit", disable=None):
        left_s = ends_s - perf_counter()
        found[part.name] = _run(part, folder, min(60 * minutes * part.share * 1.5, left_s))
        text = json.dumps(found, indent=1)
        (folder / "visit.json").write_text(text + "\n")  # after each: the machine may go
        (folder / "visit.md").write_text(table(found))
    print(table(found))
    return found


def _run(part: Part, folder: Path, limit_s: float) -> dict[str, Any]:
    """What became of a part: its result, seconds, figures and last line."""
    if limit_s < 1:
        return {"result": "no time left", "s": 0.0, "figures": None, "last": ""}
    log = folder / f"{part.name.replace(' ', '-')}.log"
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent)}
    if path := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + path
    if part.writes is not None:
        part.writes.unlink(missing_ok=True)  # an earlier visit's
    began_s = perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
    try:
        code = process.wait(limit_s)
        result = "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        result = f"stopped after {limit_s:.0f} s"
    finally:
        if process.poll() is None:  # with the trainings that it has started, which hold the GPU
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    figures = None
    if part.writes is not None and part.writes.is_file():
        figures = json.loads(part.writes.read_text())
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return {"result": result, "s": perf_counter() - began_s, "figures": figures, "last": lines[-1]}


def table(found: dict[str, Any]) -> str:
    """The parts, and the images/s of each of their rows, in Markdown."""
    machine = next((f["figures"]["machine"] for f in found.values() if f["figures"]), "")
    text = f"{machine}\n\n| part | result | s | last line |\n|---|---|---|---|\n"
    for name, part in found.items():
        last = part["last"].replace("|", "\\|")
        text += f"| {name} | {part['result']} | {part['s']:.0f} | {last[:160]} |\n"
    text += "\n| part | what | median |\n|---|---|---|\n"
    for name, part in found.items():
        for what, value in _medians(part["figures"] or {}):
            text += f"| {name} | {what} | {value} |\n"
    return text


def _medians(figures: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """The rows of repeats, and numbers, that lie anywhere in a part's figures, by their place."""
    if isinstance(figures, list) and figures and isinstance(figures[0], dict):
        middle = sorted(figures, key=lambda row: row.get("images/s", row.get("s", 0.0)))
        row = middle[len(middle) // 2]
        return [(" / ".join(path), ", ".join(f"{v:.4g} {k}" for k, v in row.items()))]
    if isinstance(figures, dict):
        return [row for key, inner in figures.items() for row in _medians(inner, (*path, key))]
    if isinstance(figures, int | float) and not isinstance(figures, bool):
        text = f"{figures:,}" if isinstance(figures, int) else f"{figures:.4g}"
        return [(" / ".join(path), text)]
    return []
