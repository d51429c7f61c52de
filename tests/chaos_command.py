"""The command of `chaos.py`: which faults, how many, and the table of what became of them."""

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import interpreter
import torch
from chaos_checkpoints import checkpoints, resumes
from chaos_disks import full_disks, mount, servers
from chaos_faults import KINDS as TRAININGS
from chaos_inputs import FILES, configurations, images, packing, shards
from chaos_runs import TASKS
from chaos_states import states
from chaos_trainings import Plan, Tally, count, run
from chaos_trial import Kind, Material, judge, make_material

INPUTS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        images,
        packing,
        shards,
        configurations,
        checkpoints,
        resumes,
        servers,
        full_disks,
        states,
    )
}
EACH = {"images": FILES, "packing": 8}  # faults of one trial; else one
# Of a thousand faults; all kinds of trainings together have the rest.
SHARES = {"images": 200, "packing": 80, "shards": 120, "configurations": 150, "checkpoints": 120,
          "resumes": 40, "servers": 80, "full_disks": 80, "states": 120}  # fmt: skip
TRAINING_SHARE = 160
MOUNTS = ("full_disks", "full_disk")  # kinds that mount a disk
NAMESPACE = "DAN_CHAOS_NAMESPACE"


def try_inputs(kind: str, numbers: range, material: Material, seed: int, until_s: float) -> Tally:
    """Makes faults of one kind and prints those that are not held."""
    each, tally = EACH.get(kind, 1), Tally()
    for number in numbers:
        if (began_s := time.monotonic()) > until_s:
            break
        held, text = judge(INPUTS[kind], material, f"{seed} {kind} {number}")
        tally.tried += each
        tally.held += each * held
        tally.seconds += time.monotonic() - began_s
        if not held:
            print(f"{kind} {number} FELL: {text}", flush=True)
    return tally


def shares(kinds: list[str], faults: int) -> tuple[dict[str, int], int]:
    """The faults of each kind of input, and of all trainings."""
    parts = {kind: SHARES[kind] for kind in kinds if kind in SHARES}
    rest = TRAINING_SHARE if any(kind in TRAININGS for kind in kinds) else 0
    total = sum(parts.values()) + rest
    found = {kind: round(faults * part / total) for kind, part in parts.items()}
    return found, faults - sum(found.values()) if rest else 0


def unused(files: set[Path]) -> set[Path]:
    """Those of the files in shared memory that no living process has mapped: they were leaked."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has just ended
            mapped += maps.read_text()
    return {path for path in files if path.exists() and str(path) not in mapped}


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| kind | tried | held | seconds | steps computed again |", "|---|---|---|---|---|"]
    for kind, t in tallies.items():
        steps = t.steps if kind in TRAININGS else ""
        lines.append(f"| `{kind}` | {t.tried} | {t.held} | {t.seconds:.0f} | {steps} |")
    held, seconds = sum(t.held for t in tallies.values()), sum(t.seconds for t in tallies.values())
    return "\n".join([*lines, f"| all | {count(tallies)} | {held} | {seconds:.0f} | |"])


def own_namespace() -> bool:
    """Whether this process may mount disks, which go with it; if it may, it starts anew there."""
    if os.environ.get(NAMESPACE):
        mount(Path("/dev/shm"), "size=50%")  # what is left there is then nobody else's
        return True
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        print("full disks are left out: mounting needs root", flush=True)
        return False
    command = ["unshare", "-m", sys.executable, *sys.argv]
    os.execvpe("unshare", command, {**os.environ, NAMESPACE: "1"})


@contextmanager
def forking(folder: Path) -> Iterator[None]:
    """Ranks are forked by pytest's server, or else by one of our own."""
    if interpreter.PROGRAM in os.environ:
        yield
        return
    (own := folder / "interpreter").mkdir()
    os.environ[interpreter.PROGRAM] = str(interpreter.stand_in(own))
    try:
        yield
    finally:
        interpreter.stop(own)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/chaos.py", description=__doc__)
    every = [*INPUTS, *TRAININGS]
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kinds", default=",".join(every), help="of faults, with commas")
    parser.add_argument("--first", type=int, default=0, help="number of each input's first fault")
    parser.add_argument("--minutes", type=float, default=180, help="after which none begins")
    parser.add_argument("--task", choices=TASKS, default="baseline", help="what is trained")
    options = parser.parse_args()
    until_s = time.monotonic() + 60 * options.minutes
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(every):
        parser.error(f"no such kinds: {', '.join(unknown)}; there are {', '.join(every)}")
    if any(kind in MOUNTS for kind in kinds) and not own_namespace():
        kinds = [kind for kind in kinds if kind not in MOUNTS]
    torch.set_num_threads(1)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    shared_memory = set(Path("/dev/shm").iterdir())
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    (parts, rest), undisturbed = shares(kinds, options.faults), ""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, forking(Path(name)):
        folder = Path(name)
        if parts:
            os.chdir(folder)
            material = make_material(folder)
        for kind, faults in parts.items():
            end = options.first + -(-faults // EACH.get(kind, 1))
            numbers = range(options.first, end)
            tallies[kind] = try_inputs(kind, numbers, material, seed, until_s)
            print(table({kind: tallies[kind]}).splitlines()[2], flush=True)
        if rest:
            own = [kind for kind in kinds if kind in TRAININGS]
            try:
                run(folder, Plan(own, rest, options.task, until_s), seed, tallies)
            except AssertionError as error:
                undisturbed = f"FELL, undisturbed: {error}"
    print(table(tallies))
    print(undisturbed, end="\n" * bool(undisturbed))
    if left := unused(set(Path("/dev/shm").iterdir()) - shared_memory):
        print(f"left in shared memory: {left}", file=sys.stderr)
    return int(bool(left or undisturbed) or any(t.held < t.tried for t in tallies.values()))
