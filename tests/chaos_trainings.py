"""Trainings that lose processes, disk, data and their tracking server at random steps.

When one gets to its end, its weights and its MLflow run are compared with those of a run that
nobody disturbed: bit for bit at the same ranks; where ranks come and go (`resize`), to 1e-9 in
float64. Most start by the fork server, some by torchrun.
"""

import collections
import random
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from chaos_disks import small_disk
from chaos_faults import KINDS
from chaos_runs import CONFIG, ELASTIC, EPOCH, EXACT, TASKS, Attempt, Campaign
from mlflow_server import served

from dan_dist.run import checkpoint
from dan_dist.run.folder import step_path
from shards.packing.writer import pack
from shards.releases import synthetic

METRICS = ("train/loss", "train/gradient_norm", "train/lr", "val/accuracy", "val/best_accuracy")
DISK_BYTES = 2**27  # of DAN in float64 there are five checkpoints at once, 0.1 GB
LAUNCHED = 0.1  # of the starts are torchrun's, which take twice as long


@dataclass
class Tally:
    """What became of the faults of one kind."""

    tried: int = 0
    held: int = 0
    seconds: float = 0.0  # of a training: from the fault to the step where it struck
    steps: int = 0  # computed again


def disturb(campaign: Campaign, kind: str, tallies: dict[str, Tally]) -> bool:
    """One attempt with one fault; False if the run got to its end first."""
    ranks = campaign.dice.choice([1, 2, 3]) if kind == "resize" else campaign.ranks
    attempt = campaign.start(ranks)
    target = campaign.somewhere()
    met = attempt.reach(target)
    settle(campaign, attempt, tallies)
    if not met:
        assert attempt.end() == 0, attempt.text
        return False
    began_s = time.monotonic()
    tallies[kind].tried += 1
    campaign.faults.append(kind)
    KINDS[kind](campaign, attempt)
    campaign.reached = max(campaign.reached, attempt.step)
    campaign.owed.append((kind, attempt.step, began_s))
    print(f"  {kind} at step {attempt.step}, {ranks} ranks, {type(attempt).__name__}", flush=True)
    return '"finished"' not in campaign.outcome()


def settle(campaign: Campaign, attempt: Attempt, tallies: dict[str, Tally]) -> None:
    """Books what the last fault has cost, once the run is where it was."""
    for kind, step, began_s in campaign.owed:
        attempt.reach(min(step, campaign.total))
        tallies[kind].steps += max(0, step - attempt.resumed)
        tallies[kind].seconds += time.monotonic() - began_s
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


def check(campaign: Campaign, expected: dict[str, Any], tolerance: float) -> None:
    """Weights, metrics and MLflow's points are those of the undisturbed run."""
    found = learned(campaign)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        worst = float((found["tensors"][name] - tensor).abs().max())
        assert worst <= tolerance, f"{name} differs by {worst}"
    assert found["metrics"] == expected["metrics"]
    found, expected = points(campaign), expected["points"]
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


@dataclass(frozen=True)
class Plan:
    """Which trainings are disturbed, and how."""

    kinds: list[str]
    faults: int
    task: str
    until_s: float  # of the monotonic clock, when no further fault begins
    epochs: int = 6

    def options(self, *, is_elastic: bool) -> list[str]:
        return [*TASKS[self.task], *(ELASTIC if is_elastic else EXACT)]


class Field:
    """Where trainings are disturbed: their data, MLflow's store, a small disk, and references."""

    def __init__(self, folder: Path, plan: Plan, dice: random.Random) -> None:
        self.folder, self.plan, self.dice = folder, plan, dice
        self.uri, self.server = "", None
        self.disk: Path | None = None
        self.references: dict[tuple[int, bool], Campaign] = {}
        faces = synthetic.release(80, 16, size=32, seed=7)
        if plan.task == "identity":
            faces = synthetic.identity_release(80, 60, identities=16, held_out=20, size=32, seed=7)
        pack(faces, folder / "shards", size=32, shard_size=20, workers=1)

    @contextmanager
    def opened(self) -> Iterator[None]:
        disk = self.folder / "disk"
        small = small_disk(disk, DISK_BYTES) if "full_disk" in self.plan.kinds else nullcontext()
        needed = "tracker_outage" in self.plan.kinds
        with small as self.disk, served(self.folder, needed=needed) as (self.uri, self.server):
            yield

    def campaign(self, name: str, ranks: int, *, is_elastic: bool) -> Campaign:
        config, plan = self.folder / f"{name}.yaml", self.plan
        output = (self.disk or self.folder) / name
        config.write_text(
            CONFIG.format(shards=self.folder / "shards", output=output, epochs=plan.epochs)
        )
        options = plan.options(is_elastic=is_elastic)
        return Campaign(self.folder, config, output, options, self.uri, self.dice, plan.epochs,
                        ranks, self.disk, LAUNCHED, self.server)  # fmt: skip

    def reference(self, ranks: int, *, is_elastic: bool) -> dict[str, Any]:
        """What an undisturbed run has learned and recorded, trained when it is first asked for."""
        key = ranks, is_elastic
        if key not in self.references:
            whole = self.campaign(f"reference-{ranks}-{is_elastic}", ranks, is_elastic=is_elastic)
            finish(whole, collections.defaultdict(Tally))
            self.references[key] = {**learned(whole), "points": points(whole)}
            shutil.rmtree(whole.output)
        return self.references[key]


def disturb_one(place: Field, name: str, left: int, tallies: dict[str, Tally]) -> None:
    """One run, disturbed until its end; its faults are held if it ends as an undisturbed one."""
    plan, dice = place.plan, place.dice
    kinds = plan.kinds
    is_elastic = "resize" in kinds and (len(kinds) == 1 or dice.random() < 1 / len(kinds))
    own = ["resize"] if is_elastic else [kind for kind in kinds if kind != "resize"]
    ranks = 2 if is_elastic else dice.choice((1, 1, 2))
    reference = place.reference(ranks, is_elastic=is_elastic)
    campaign = place.campaign(name, ranks, is_elastic=is_elastic)
    print(f"{name}: {'float64, ranks come and go' if is_elastic else f'{ranks} ranks'}", flush=True)
    try:
        going = True
        while going and len(campaign.faults) < left and time.monotonic() < plan.until_s:
            going = disturb(campaign, dice.choice(own), tallies)
        if '"finished"' not in campaign.outcome():
            finish(campaign, tallies)
        check(campaign, reference, 1e-9 if is_elastic else 0.0)
    except (AssertionError, psutil.Error):
        print(f"{name} FELL after {campaign.faults}\n{traceback.format_exc()}", flush=True)
        for attempt in campaign.attempts:
            attempt.send(signal.SIGKILL)
        return
    finally:
        (campaign.output.parent / "filler").unlink(missing_ok=True)
        shutil.rmtree(campaign.output, ignore_errors=True)
    for kind in campaign.faults:
        tallies[kind].held += 1
    print(f"{name}: as the undisturbed run", flush=True)


def run(folder: Path, plan: Plan, seed: int, tallies: dict[str, Tally]) -> None:
    """Injects the plan's faults; what became of them goes into `tallies`.

    Raises:
        AssertionError: a run that nobody disturbed did not end well.
    """
    place, number, before = Field(folder, plan, random.Random(seed)), 0, count(tallies)
    with place.opened():
        while (left := plan.faults - count(tallies) + before) > 0 and (
            time.monotonic() < plan.until_s
        ):
            disturb_one(place, f"run{number}", left, tallies)
            number += 1


def count(tallies: dict[str, Tally]) -> int:
    """The faults so far."""
    return sum(tally.tried for tally in tallies.values())
