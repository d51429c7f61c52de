"""Trainings that are killed, stopped, robbed of data and of their tracking server, and the proof
that they end as if nothing had happened.

    python tests/chaos.py --faults 100 [--seed 7] [--kinds sigkill_rank,sigterm] [--task identity]

Real two-rank CPU trainings of DAN on drawn faces, or of a backbone on persons, under torchrun, one
fault each time they run, at a random step. When a run gets to its end, its weights and its MLflow
run are compared with those of a run that nobody disturbed: bit for bit at two ranks; where ranks
come and go (`resize`), to 1e-9 in float64. Ends with a table, and with exit code 1 where a
comparison fails or shared memory is left, which takes a machine that does nothing else.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chaos_faults import KINDS
from chaos_runs import CONFIG, ELASTIC, EPOCH, EXACT, TASKS, Attempt, Campaign
from mlflow_server import served

from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path
from shards.packing.writer import pack
from shards.releases import synthetic

METRICS = ("train/loss", "train/gradient_norm", "train/lr", "val/accuracy", "val/best_accuracy")


@dataclass
class Tally:
    """What became of the faults of one kind."""

    injected: int = 0
    survived: int = 0
    steps_recomputed: int = 0
    seconds_lost: float = 0.0


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
        attempt.reach(min(step, campaign.total))
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


def learned(campaign: Campaign) -> dict[str, Any]:
    """All tensors of a run's last checkpoint, and its metrics."""
    content = checkpoint.load(step_path(campaign.output, campaign.total))
    moments = content["optimizer"]["state"]
    flat = {f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
    tensors = {k: v for k, v in {**content["objective"], **flat}.items() if torch.is_tensor(v)}
    return {"tensors": tensors, "metrics": content["metrics"]}


def check(campaign: Campaign, reference: Campaign, tolerance: float) -> None:
    """Weights, metrics and MLflow's points are those of the undisturbed run."""
    found, expected = learned(campaign), learned(reference)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        worst = float((found["tensors"][name] - tensor).abs().max())
        assert worst <= tolerance, f"{name} differs by {worst}"
    assert found["metrics"] == expected["metrics"]
    found, expected = points(campaign), points(reference)
    total = campaign.total
    expected_steps = {"train/loss": range(1, total + 1), "val/accuracy": range(0, total + 1, EPOCH)}
    for key, steps in expected_steps.items():  # the start is evaluated too
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
    folder: Path, name: str, options: list[str], uri: str, dice: random.Random, epochs: int
) -> Campaign:
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(shards=folder / "shards", output=folder / name, epochs=epochs))
    return Campaign(folder, config, options, uri, dice, epochs)


def run(
    folder: Path, faults: int, seed: int, kinds: list[str], task: str, epochs: int = 6
) -> dict[str, Tally]:
    """Injects `faults` faults; returns the tallies.

    Raises:
        AssertionError: a run did not survive, or ended otherwise than the undisturbed one.
    """
    print(f"seed {seed}", flush=True)
    dice = random.Random(seed)
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
                whole = campaign_in(folder, f"reference-{name}", options, uri, dice, epochs)
                finish(whole, tallies)
                references[name] = whole
        runs = 0
        while sum(t.injected for t in tallies.values()) < faults:
            resizes = "resize" in kinds and (len(kinds) == 1 or dice.random() < 1 / len(kinds))
            own = ["resize"] if resizes else [kind for kind in kinds if kind != "resize"]
            name, runs = f"run{runs}", runs + 1
            print(f"{name} ({'float64, ranks come and go' if resizes else 'float32, 2 ranks'})")
            campaign = campaign_in(folder, name, elastic if resizes else exact, uri, dice, epochs)
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
    return dict(tallies)


def unused(files: set[Path]) -> set[Path]:
    """Those of the files in shared memory that no living process has mapped: they were leaked."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has just ended
            mapped += maps.read_text()
    return {path for path in files if path.exists() and str(path) not in mapped}


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
    shared_memory = set(Path("/dev/shm").iterdir())
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            tallies = run(Path(folder), options.faults, seed, options.kinds.split(","),
                          options.task)  # fmt: skip
            assert not (left := unused(set(Path("/dev/shm").iterdir()) - shared_memory)), left
        except AssertionError as error:
            print(f"FAILED (seed {seed}): {error}", file=sys.stderr)
            return 1
    print(table(tallies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
