"""The order beside its peers', each in an environment of its own that is made here.

Five peers do not resolve together. Each answers the same (`question`) by a script that its
environment's Python runs; one that cannot be installed, or fails, has a row that says so.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent
LAUNCH = PEERS.parent.parent
OURS = "dan_dist"
PACKAGES = {  # peer → what its environment has; the first is the one whose version is told
    OURS: ["numpy"],
    "grain": ["grain==0.2.18", "numpy"],
    "streaming": ["mosaicml-streaming==0.13.0", "torch", "torchvision"],
    "energon": ["megatron-energon==7.4.1", "torch"],
    "litdata": ["litdata==0.2.76", "torch"],
    "torch": ["torch", "numpy"],
}
LIMIT_S = 900  # of one answer
INSTALL_S = 3600  # torch and CUDA are gigabytes
ALL = (1, 2, 3, 5, 8, 64)


def run(folder: Path) -> dict[str, Any]:
    """Prints the table and returns what it is made of; environments lie in `folder`."""
    found = {name: _ask(name, folder / name) for name in PACKAGES}
    worlds = ", ".join(map(str, ALL))
    print(
        f"\nThe order beside its peers': 7 classes, global batch 64, worlds {worlds}; an epoch of "
        "10,000,000 samples, batch 256\n\n| | balance error, images | order equal | augmentation "
        "equal | resume equal (of 1, 2, 8) | 10 million samples |\n|---|---|---|---|---|---|"
    )
    for name, answers in found.items():
        print(f"| {' | '.join(_row(name, answers))} |", flush=True)
    return found


def _ask(name: str, folder: Path) -> dict[str, Any]:
    """A peer's answers, or why there are none."""
    python = folder / "env" / "bin" / "python"
    try:
        if not python.exists():
            venv.create(folder / "env", with_pip=True)
        _output([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                 *PACKAGES[name]], {}, limit_s=INSTALL_S)  # fmt: skip
        environment = {"PYTHONPATH": f"{LAUNCH}:{LAUNCH.parent}" if name == OURS else f"{LAUNCH}"}
        answers: dict[str, Any] = {"versions": _versions(python, name)}
        for part in ("small", "large"):
            shutil.rmtree(folder / part, ignore_errors=True)  # of an earlier run
            (folder / part).mkdir()
            script = [python, PEERS / f"with_{name}.py", part, folder / part]
            answers[part] = json.loads(_output(script, environment).splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        why = str(getattr(error, "stderr", None) or error)
        return {"failed": why.strip().splitlines()[-1]}
    return answers


def _output(command: list[Any], environment: dict[str, str], limit_s: float = LIMIT_S) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        [str(word) for word in command], env={**kept, **environment}, check=True, text=True,
        capture_output=True, timeout=limit_s,
    ).stdout  # fmt: skip


def _versions(python: Path, name: str) -> str:
    names = [package.split("==")[0] for package in PACKAGES[name]]
    if name == OURS:
        return f"dan_dist, Python {sys.version_info.major}.{sys.version_info.minor}"
    code = (
        "import sys, importlib.metadata as m; "
        "print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    )
    return _output([python, "-c", code, *names], {}).strip()


def _row(name: str, answers: dict[str, Any]) -> list[str]:
    if "failed" in answers:
        return [name, f"could not be asked: {answers['failed']}", *["–"] * 4]
    small, large = answers["small"], answers["large"]
    if "balance" not in small:
        return [answers["versions"], f"failed: {small['failed']}", *["–"] * 4]
    balance = small["balance"].values()
    low, high = min(balance), max(balance)
    resumed = _worlds(small["resume, augmented"])
    if small["resume, augmented"] != small["resume"]:
        resumed = f"{_worlds(small['resume'])}; with its augmentation {resumed}"
    if (samples := large["samples"]) == 0:
        time = f"not within {large['seconds']:.0f} s: they have to be written first"
    elif samples < 9_800_000:
        time = f"{samples:,} in {large['seconds']:.0f} s, {large['mib']:.0f} MiB"
    else:
        time = f"{large['seconds']:.1f} s, {large['mib']:.0f} MiB"
    return [
        answers["versions"], f"{low:.2f} to {high:.2f}" if low != high else f"{low:.2f}",
        _worlds(small["order"]), _worlds(small["augmentation"]), resumed, time,
    ]  # fmt: skip


def _worlds(worlds: list[int]) -> str:
    if worlds == [1]:
        return "only 1 itself"
    return "all" if worlds == [*ALL] else ", ".join(map(str, worlds)) or "none"
