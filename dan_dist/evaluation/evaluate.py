"""The story of an evaluation: checkpoint, shards, a pass over one split, figures, JSON, MLflow."""

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dan_dist.data.cache import localise
from dan_dist.distributed.heartbeat import session
from dan_dist.evaluation.judge import (
    Details,
    EvaluationResult,
    Rows,
    judge_classes,
    judge_pairs,
)
from dan_dist.evaluation.predictions import predict
from dan_dist.evaluation.task import pairs_of
from dan_dist.model.classes import columns_of, join_names
from dan_dist.model.dan import Output, features, probabilities
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import EvaluateOptions
from dan_dist.run.folder import check_writable
from dan_dist.tracking.figures import save
from dan_dist.tracking.tracker import RunRecord, record_run
from shards.files import write_atomically
from shards.format import ShardSet, Split, open_shardset

log = logging.getLogger(__name__)

REPORT = "evaluation.json"


class Inputs(NamedTuple):
    """The images of an evaluation, and how a network is judged by them."""

    split: Split
    select: Callable[[Output], Tensor]  # see `engine.evaluate`
    judge: Callable[[Rows], EvaluationResult]
    facts: dict[str, Any]  # about the judge, plain values for the JSON file


def main(options: EvaluateOptions, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Evaluates a checkpoint on all ranks, each image once; returns the JSON file's content.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    with session(options.device, timeout_s=timeout_s, on_loss=lambda line: None) as (world, heart):
        trained = world.run_on_all(
            lambda: load_trained(
                options.checkpoint, options.classes, task=None, weights=options.weights
            )
        )
        cached = world.run_once(lambda: localise(options.data, options.cache), per_node=True)
        shards = world.run_on_all(lambda: open_shardset(cached))
        open_inputs = open_pairs if trained.task == "identity" else open_classes
        inputs = world.run_on_all(lambda: open_inputs(shards, trained, options))
        output = output_folder(options, trained, f"{shards.dataset}-{inputs.split.name}")
        world.run_once(lambda: check_writable(output, "--output"))
        rows = predict(trained, inputs.split, world, heart, options.precision, inputs.select)
        details = inputs.judge(rows).details()
        report = {
            "checkpoint": trained.path.name,
            "step": trained.step,
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "split": inputs.split.name,
            "images": len(inputs.split),
            **details.values,
            **inputs.facts,
        }
        if world.is_main:
            save_report(report, details, trained, options, output)
        return report


def output_folder(options: EvaluateOptions, trained: Trained, what: str) -> Path:
    """Where the figures go: --output, or a folder beside the checkpoint."""
    own = re.sub(r"[^\w.-]", "_", f"{trained.path.stem}-{what}")  # names may hold slashes
    return options.output or trained.path.parent / own


def usual_split(shards: ShardSet, name: str | None, trained: Trained) -> str:
    """The name of the split to evaluate: None takes that of the training's own evaluations.

    Where that is not known or is not there, "val" or "test".
    """
    if name is not None:
        return name
    usual = [trained.config["data"]["val_split"]] if trained.config else []
    choice = [n for n in (*usual, "val", "test") if n in shards.splits]
    return choice[0] if choice else "val"


def open_split(shards: ShardSet, name: str | None, trained: Trained) -> tuple[list[int], Split]:
    """The split to evaluate, and where its classes stand among the network's.

    name: see `usual_split`. Other classes, or an empty split, are a ValueError.
    """
    columns = columns_of(trained.class_names, shards.class_names)
    if columns is None:
        raise ValueError(
            f"{trained.path} was trained on {len(trained.class_names)} classes "
            f"({join_names(trained.class_names)}), {shards.root} has {len(shards.class_names)} "
            f"({join_names(shards.class_names)})"
        )
    split = shards.split(usual_split(shards, name, trained))
    if not len(split):
        raise ValueError(f"{shards.root}: split '{split.name}' is empty")
    return columns, split


def open_classes(shards: ShardSet, trained: Trained, options: EvaluateOptions) -> Inputs:
    """A split by whose classes a network is judged, in the shards' order of classes."""
    columns, split = open_split(shards, options.split, trained)
    title = _title(shards, split)
    return Inputs(
        split, probabilities, lambda rows: judge_classes(rows[:, columns], split, title), {}
    )


def open_pairs(shards: ShardSet, trained: Trained, options: EvaluateOptions) -> Inputs:
    """The pairs by which a network that was trained on identities is judged, and their images."""
    split = shards.split(usual_split(shards, options.split, trained))
    count = trained.config["data"]["pairs"] if options.pairs is None else options.pairs
    own, pairs = pairs_of(split, pairs=count, pairs_file=options.pairs_file)
    persons = {split.class_names[k] for k in np.unique(own.index["label"]).tolist()}
    if known := persons.intersection(trained.class_names):
        log.warning("%d of %d persons have names that training knows as well: %s", len(known),
                    len(persons), join_names(sorted(known)))  # fmt: skip
    facts = {"pairs_file": options.pairs_file and Path(options.pairs_file).name}
    judge = partial(judge_pairs, pairs=pairs, title=_title(shards, split))
    return Inputs(own, features, judge, facts)


def _title(shards: ShardSet, split: Split) -> str:
    return f"{shards.dataset}, split '{split.name}'"


def save_report(
    report: dict[str, Any], details: Details, trained: Trained, options: EvaluateOptions,
    output: Path,
) -> None:  # fmt: skip
    """Draws the figures, writes the JSON file, records both in MLflow, logs the numbers."""
    for figure in details.figures:
        save(figure.draw(*figure.values), output / figure.name)
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")
    if not options.no_tracking:
        track(output, report, details, trained, options.experiment)
    for line in details.lines:
        log.info("%s", line)
    log.info("figures and %s: %s", REPORT, output)


def track(
    output: Path, report: dict[str, Any], details: Details, trained: Trained, experiment: str | None
) -> None:
    """A run of its own in MLflow, which names the training's."""
    where = f"{report['dataset']}-{report['split']}"
    record = RunRecord(
        experiment=experiment or trained.experiment,
        name=f"evaluate {trained.name} on {where}",
        params={key: report[key] for key in ("checkpoint", "dataset", "release", "split")},
        tags={"kind": "evaluation", "trained_by": trained.run_id or "unknown",
              "fingerprint": report["fingerprint"]},
        config=trained.config,
    )  # fmt: skip
    metrics = {f"eval/{name}": value for name, value in details.metrics.items()}
    artifacts = (REPORT, *(figure.name for figure in details.figures))
    record_run(output, record, metrics=metrics, step=report["step"], artifacts=artifacts)
