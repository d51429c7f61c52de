"""Trainings that are killed, format_metrics to stop, robbed of data and of their tracking server, and the
proof that they end as if nothing had happened.

    python tests/chaos.py --faults 100 [--seed 7] [--kinds sigkill_rank,sigterm] [--task identity]

Real two-rank CPU trainings of DAN on drawn faces, or of a backbone on persons, under torchrun, one
fault each time they run, at a random step. When a run gets to its end, its weights and its MLflow
run are compared with those of a run that nobody disturbed: bit for bit at two ranks; where ranks
come and go (`resize`), to 1e-9 in float64. Ends with a table, and with exit code 1 where a
comparison fails.
"""

import argparse
import collections
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path, steps_saved
from dan_dist.run.outcome import OUTCOME
from shards.packing.writer import pack
from shards.releases import synthetic

REPOSITORY = Path(__file__).resolve().parent.parent
TOTAL = 60  # steps of a run: six epochs of ten
ATTEMPT_S = 180.0  # hard limit of anything that is waited for
METRICS = ("train/loss", "train/gradient_norm", "train/lr", "val/accuracy", "val/best_accuracy")
DAN = ["model.heads=2", "loss.fcn=affinity", "loss.afn=partition"]
IDENTITY = ["task=identity", "model.heads=0", "loss.fcn=none", "loss.afn=none", "data.pairs=60",
            "loss.classification=arcface", "data.sampling=shuffle"]  # fmt: skip
TASKS = {"expression": DAN, "identity": IDENTITY}
EXACT = ["optim.name=adam", "optim.lr=1e-3", "train.precision=float32"]  # bit for bit
ELASTIC = ["optim.lr=1e-7", "optim.momentum=0.0", "train.precision=float64"]  # see README
CONFIG = """
data: {{shards: {shards}, max_bad_images: 0, augment: {{affine_p: 0.7, degrees: 20,
  scale: [0.8, 1.0], translate: 0.2, erase_p: 0.5}}}}
model: {{image_size: 32}}
train: {{epochs: 6, global_batch: 8, device: cpu, log_every: 1, checkpoint_every: 7,
  keep_checkpoints: 3, timeout_s: 20, output: {output}}}
tracking: {{experiment: chaos}}
"""


@dataclass
class Tally:
    """What became of the faults of one kind."""

    injected: int = 0
    survived: int = 0
    steps_recomputed: int = 0
    seconds_lost: float = 0.0


class Attempt:
    """One start of the documented command, followed by what it prints."""

    def __init__(self, config: Path, ranks: int, options: list[str], uri: str) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = str(REPOSITORY / "launch" / "train.py")
        self.ranks, self.family = ranks, list[psutil.Process]()
        self.log = config.with_suffix(f".{time.time_ns()}.log")
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_TRACKING_URI": uri,
                       "OMP_NUM_THREADS": "1"}  # fmt: skip
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*torchrun, f"--nproc-per-node={ranks}", script, str(config), *options],
                stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=config.parent,
                start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def step(self) -> int:
        """The last step that was told of."""
        return int((re.findall(r" step (\d+) loss", self.text) or ["0"])[-1])

    @property
    def resumed(self) -> int:
        found = re.search(r"resumed after step (\d+)", self.text)
        return int(found[1]) if found else 0

    def reach(self, step: int) -> bool:
        """Waits for a step; False if the process ended before."""
        deadline = time.monotonic() + ATTEMPT_S
        while self.step < step:
            if self.process.poll() is not None:
                return False
            if len(self.family) < self.ranks:
                with suppress(psutil.NoSuchProcess):
                    self.family = psutil.Process(self.process.pid).children()
            assert time.monotonic() < deadline, f"stuck before step {step}:\n{self.text}"
            time.sleep(0.02)
        return True

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.family if p.is_running()] or [psutil.Process(self.process.pid)]

    def end(self) -> int:
        """Waits for the end, after which nothing of it may be left; returns the exit code."""
        try:
            code = self.process.wait(ATTEMPT_S)
        finally:
            left = self.family  # torchrun's workers have sessions of their own
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and any(p.is_running() for p in left):
                time.sleep(0.05)
            stayed = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            for process in stayed:
                process.kill()
        assert not stayed, f"left behind: {stayed}\n{self.text}"
        return code


class Server:
    """A real MLflow server that can be taken away and comes back at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store,
                   "--artifacts-destination", str(self.folder / "artifacts"), "--host",
                   "127.0.0.1", "--port", str(self.port), "--workers", "1"]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise TimeoutError("mlflow server did not start")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Campaign:
    """One run that is disturbed until it has got to its end."""

    folder: Path
    config: Path
    options: list[str]
    uri: str
    dice: random.Random
    server: Server | None = None
    reached: int = 0  # the furthest step so far
    owed: list[tuple[str, int, float]] = field(default_factory=list)  # fault, step, when

    @property
    def output(self) -> Path:
        return self.config.with_suffix("")

    def start(self, ranks: int = 2) -> Attempt:
        return Attempt(self.config, ranks, self.options, self.uri)

    def somewhere(self) -> int:
        """A step a little further on."""
        return min(self.reached + self.dice.randint(1, 10), TOTAL - 1)

    def outcome(self) -> str:
        path = self.output / OUTCOME
        return path.read_text() if path.is_file() else ""


def sigkill_rank(campaign: Campaign, attempt: Attempt) -> None:
    for worker in campaign.dice.sample(attempt.workers(), 1):
        worker.kill()
    assert attempt.end() != 0 or '"finished"' in campaign.outcome(), attempt.text


def sigkill_all(campaign: Campaign, attempt: Attempt) -> None:
    time.sleep(campaign.dice.uniform(0, 0.2))  # in the middle of a step, a checkpoint …
    attempt.process.kill()  # the workers end with it
    attempt.end()


def sigterm(campaign: Campaign, attempt: Attempt) -> None:
    attempt.process.send_signal(signal.SIGTERM)  # to torchrun, as a scheduler does
    attempt.end()
    assert '"preempted"' in campaign.outcome() or '"finished"' in campaign.outcome(), attempt.text


def sigusr1(campaign: Campaign, attempt: Attempt) -> None:
    for worker in campaign.dice.sample(attempt.workers(), 1):  # to any rank
        worker.send_signal(signal.SIGUSR1)
    assert attempt.end() == 0, attempt.text
    assert '"preempted"' in campaign.outcome() or '"finished"' in campaign.outcome(), attempt.text


def corrupt_checkpoint(campaign: Campaign, attempt: Attempt) -> None:
    attempt.reach(15)  # two are written by then: where none can be read, a run refuses to go on
    sigkill_all(campaign, attempt)
    for path in steps_saved(campaign.output)[:1]:
        at = campaign.dice.randrange(path.stat().st_size)
        if campaign.dice.random() < 0.3:
            os.truncate(path, at)
        else:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(campaign.dice.randbytes(2000))


def truncate_shard(campaign: Campaign, attempt: Attempt) -> None:
    shards = campaign.folder / "shards"
    # the largest class; persons are mixed in all shards
    tars = sorted(shards.glob("train-01-*.tar")) or sorted(shards.glob("train-*.tar"))
    originals = {path: path.read_bytes() for path in tars}
    for path in tars:
        os.truncate(path, 1024)
    code = attempt.end()
    text = attempt.text
    for path, content in originals.items():
        path.write_bytes(content)
    if '"finished"' not in campaign.outcome():  # the last steps were read in advance
        assert code != 0 and "are damaged" in text, text
        assert any(path.name in text for path in tars), text


def tracker_outage(campaign: Campaign, attempt: Attempt) -> None:
    server = campaign.server
    assert server is not None
    hangs = campaign.dice.random() < 0.5
    if hangs:
        os.killpg(server.process.pid, signal.SIGSTOP)
    else:
        server.stop()
    go_on = attempt.reach(min(attempt.step + 8, TOTAL - 1))
    if hangs:
        os.killpg(server.process.pid, signal.SIGCONT)
    else:
        server.start()
    if go_on:
        sigkill_all(campaign, attempt)
    else:
        attempt.end()


def resize(campaign: Campaign, attempt: Attempt) -> None:
    """The attempt had one, two or three ranks; the next one has another number."""
    campaign.dice.choice([sigterm, sigkill_rank, sigkill_all])(campaign, attempt)


KINDS: dict[str, Callable[[Campaign, Attempt], None]] = {
    f.__name__: f
    for f in (sigkill_rank, sigkill_all, sigterm, sigusr1, corrupt_checkpoint, truncate_shard,
              tracker_outage, resize)
}  # fmt: skip


def disturb(campaign: Campaign, kind: str, tallies: dict[str, Tally]) -> bool:
    """One attempt with one fault; False if the run got to its end first."""
    ranks = campaign.dice.choice([1, 2, 3]) if kind == "resize" else 2
    attempt = campaign.start(ranks)
    target = campaign.somewhere()
    met = attempt.reach(target)
    settle(campaign, attempt, tallies)
    if not met:
        assert attempt.end() == 0, attempt.text
        return False
    began = time.monotonic()
    tallies[kind].injected += 1
    KINDS[kind](campaign, attempt)
    campaign.reached = max(campaign.reached, attempt.step)
    campaign.owed.append((kind, attempt.step, began))
    print(f"  {kind} at step {attempt.step}, {ranks} ranks", flush=True)
    return '"finished"' not in campaign.outcome()


def settle(campaign: Campaign, attempt: Attempt, tallies: dict[str, Tally]) -> None:
    """Books what the last fault has cost, once the run is where it was."""
    for kind, step, began in campaign.owed:
        attempt.reach(min(step, TOTAL))
        tallies[kind].survived += 1
        tallies[kind].steps_recomputed += max(0, step - attempt.resumed)
        tallies[kind].seconds_lost += time.monotonic() - began
    campaign.owed.clear()


def finish(campaign: Campaign, tallies: dict[str, Tally]) -> None:
    """Lets the run get to its end, undisturbed."""
    attempt = campaign.start()
    settle(campaign, attempt, tallies)
    assert attempt.end() == 0, attempt.text
    assert '"finished"' in campaign.outcome()


def learned(folder: Path) -> dict[str, Any]:
    """All tensors of a run's last checkpoint, and its metrics."""
    path = step_path(folder, TOTAL)
    content = checkpoint.load(path)
    moments = content["optimizer"]["state"]
    flat = {f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
    tensors = {k: v for k, v in {**content["objective"], **flat}.items() if torch.is_tensor(v)}
    return {"tensors": tensors, "metrics": content["metrics"]}


def check(campaign: Campaign, reference: Campaign, tolerance: float) -> None:
    """Weights, metrics and MLflow's points are those of the undisturbed run."""
    found, expected = learned(campaign.output), learned(reference.output)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        worst = float((found["tensors"][name] - tensor).abs().max())
        assert worst <= tolerance, f"{name} differs by {worst}"
    assert found["metrics"] == expected["metrics"]
    found, expected = points(campaign), points(reference)
    for key, steps in (("train/loss", range(1, TOTAL + 1)), ("val/accuracy", range(10, 61, 10))):
        assert [step for step, _ in found[key]] == list(steps), (key, found[key])
    for key in METRICS:
        for (step, value), (_, wanted) in zip(found[key], expected[key], strict=True):
            assert abs(value - wanted) <= tolerance * max(1.0, abs(wanted)), (
                f"{key} at step {step}: {value}, not {wanted}"
            )


def points(campaign: Campaign) -> dict[str, list[tuple[int, float]]]:
    """What MLflow holds of the one run of this campaign."""
    import mlflow

    from dan_dist.tracking.tracker import replay

    replay(campaign.output, campaign.uri)
    client = mlflow.MlflowClient(campaign.uri)
    number = client.get_experiment_by_name("chaos").experiment_id
    runs = client.search_runs([number], f"attributes.run_name = '{campaign.output.name}'")
    assert len(runs) == 1, f"{len(runs)} runs"
    assert runs[0].info.status == "FINISHED"
    history = partial(client.get_metric_history, runs[0].info.run_id)
    return {key: sorted((p.step, p.value) for p in history(key)) for key in METRICS}


def campaign_in(
    folder: Path, name: str, options: list[str], uri: str, dice: random.Random
) -> Campaign:
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(shards=folder / "shards", output=folder / name))
    return Campaign(folder, config, options, uri, dice)


def run(
    folder: Path, faults: int, seed: int, kinds: list[str], task: str = "expression"
) -> dict[str, Tally]:
    """Injects `faults` faults; returns the tallies.

    Raises:
        AssertionError: a run did not survive, or ended otherwise than the undisturbed one.
    """
    print(f"seed {seed}", flush=True)
    dice, shared_memory = random.Random(seed), set(Path("/dev/shm").iterdir())
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    faces = synthetic.release(80, 16, size=32, seed=7)
    if task == "identity":
        faces = synthetic.identity_release(80, 60, identities=16, held_out=20, size=32, seed=7)
    pack(faces, folder / "shards", size=32, shard_size=20)
    exact, elastic = [*TASKS[task], *EXACT], [*TASKS[task], *ELASTIC]
    with served(folder, needed="tracker_outage" in kinds) as (uri, server):
        references = {}
        for name, options in (("exact", exact), ("elastic", elastic)):
            if any((kind == "resize") == (name == "elastic") for kind in kinds):
                whole = campaign_in(folder, f"reference-{name}", options, uri, dice)
                finish(whole, tallies)
                references[name] = whole
        runs = 0
        while sum(t.injected for t in tallies.values()) < faults:
            resizes = "resize" in kinds and (len(kinds) == 1 or dice.random() < 1 / len(kinds))
            own = ["resize"] if resizes else [kind for kind in kinds if kind != "resize"]
            name, runs = f"run{runs}", runs + 1
            print(f"{name} ({'float64, ranks come and go' if resizes else 'float32, 2 ranks'})")
            campaign = campaign_in(folder, name, elastic if resizes else exact, uri, dice)
            campaign.server = server
            going = True
            while going and sum(t.injected for t in tallies.values()) < faults:
                going = disturb(campaign, dice.choice(own), tallies)
            if '"finished"' not in campaign.outcome():
                finish(campaign, tallies)
            for kind, _, _ in campaign.owed:
                tallies[kind].survived += 1
            reference = references["elastic" if resizes else "exact"]
            check(campaign, reference, 1e-9 if resizes else 0.0)
            print(f"{name}: as the undisturbed run", flush=True)
            shutil.rmtree(campaign.output)
    assert not (left := unused(set(Path("/dev/shm").iterdir()) - shared_memory)), left
    return dict(tallies)


def unused(files: set[Path]) -> set[Path]:
    """Those of the files in shared memory that no living process has mapped: they were leaked."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has just ended
            mapped += maps.read_text()
    return {path for path in files if path.exists() and str(path) not in mapped}


@contextmanager
def served(folder: Path, *, needed: bool) -> Iterator[tuple[str, Server | None]]:
    """MLflow's address: a server where one is to be taken away, else a file."""
    if not needed:
        yield f"sqlite:///{folder / 'mlflow.db'}", None
        return
    server = Server(folder)
    try:
        yield server.uri, server
    finally:
        server.stop()


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| fault | injected | survived | steps recomputed | seconds lost, each |",
             "|---|---|---|---|---|"]  # fmt: skip
    for kind, t in tallies.items():
        each = t.seconds_lost / max(t.survived, 1)
        lines.append(
            f"| {kind} | {t.injected} | {t.survived} | {t.steps_recomputed} | {each:.1f} |"
        )
    total, lived = (sum(getattr(t, n) for t in tallies.values()) for n in ("injected", "survived"))
    steps = sum(t.steps_recomputed for t in tallies.values())
    return "\n".join([*lines, f"| all | {total} | {lived} | {steps} | |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of faults, with commas")
    parser.add_argument("--task", choices=TASKS, default="expression", help="what is trained")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            tallies = run(Path(folder), options.faults, seed, options.kinds.split(","),
                          options.task)  # fmt: skip
        except AssertionError as error:
            print(f"FAILED (seed {seed}): {error}", file=sys.stderr)
            return 1
    print(table(tallies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
