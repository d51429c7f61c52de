"""The story of an evaluation: checkpoint, shards, a pass over one split, figures, JSON, MLflow."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
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
from dan_dist.run.results import result_folder
from dan_dist.tracking.figures import save
from dan_dist.tracking.inputs import dataset_inputs, model_of
from dan_dist.tracking.tracker import RunRecord, check_recorded, record_run
from shards.files import write_atomically
from shards.format import ShardSet, Split, open_shardset

log = logging.getLogger(__name__)

REPORT = "evaluation.json"
# What a report is of; another of the same replaces it.
OF = ("checkpoint", "step", "weights", "dataset", "release", "fingerprint", "split", "pairs_sha256")
CONTEXTS = {"train": "train", "val": "val"}  # MLflow's word for a split; any other is a test


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
        if not options.no_tracking:
            world.run_once(lambda: check_recorded(options.experiment or trained.experiment))
        cached = world.run_once(lambda: localise(options.data, options.cache), per_node=True)
        shards = world.run_on_all(lambda: open_shardset(cached))
        open_inputs = open_pairs if trained.task == "identity" else open_classes
        inputs = world.run_on_all(lambda: open_inputs(shards, trained, options))
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
            "weights": options.weights,
            **details.values,
            **inputs.facts,
        }
        if world.is_main:
            used = dataset_inputs(shards, {CONTEXTS.get(inputs.split.name, "test"): inputs.split},
                                  options.data)  # fmt: skip
            save_report(report, details, trained, options, used)
        return report


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
    listed = hashlib.sha256(np.stack(pairs).tobytes()).hexdigest()
    facts = {
        "pairs_file": options.pairs_file and Path(options.pairs_file).name,
        "pairs_sha256": listed,
    }
    judge = partial(judge_pairs, pairs=pairs, title=_title(shards, split))
    return Inputs(own, features, judge, facts)


def _title(shards: ShardSet, split: Split) -> str:
    return f"{shards.dataset}, split '{split.name}'"


def save_report(
    report: dict[str, Any], details: Details, trained: Trained, options: EvaluateOptions,
    used: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """Draws the figures, writes the JSON file, records both in MLflow, logs the numbers."""
    # Names from a manifest may hold anything, slashes too.
    own = re.sub(r"[^\w.-]", "_", f"{trained.path.stem}-{report['dataset']}-{report['split']}")
    output = result_folder(
        options.output or trained.path.parent / own, REPORT,
        {key: report[key] for key in OF if key in report},
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    for figure in details.figures:
        save(figure.draw(*figure.values), output / figure.name)
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")
    if not options.no_tracking:
        track(output, report, details, trained, options.experiment, used)
    for line in details.lines:
        log.info("%s", line)
    log.info("figures and %s: %s", REPORT, output)


def track(
    output: Path, report: dict[str, Any], details: Details, trained: Trained,
    experiment: str | None, used: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """A run of its own in MLflow, which names the training's."""
    where = f"{report['dataset']} ({report['release']}), split {report['split']}"
    model = model_of(trained)
    record = RunRecord(
        experiment=experiment or trained.experiment,
        name=f"evaluate {trained.name}, {trained.path.stem}, on {where}",
        params={key: report[key] for key in ("checkpoint", "dataset", "release", "split")},
        tags={"kind": "evaluation", "trained_by": model.run_id if model else "unknown",
              "fingerprint": report["fingerprint"]},
        config=trained.config,
        datasets=used,
        model=model,
    )  # fmt: skip
    metrics = {f"eval/{name}": value for name, value in details.metrics.items()}
    artifacts = (REPORT, *(figure.name for figure in details.figures))
    record_run(output, record, metrics=metrics, step=report["step"], artifacts=artifacts)
