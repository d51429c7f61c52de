"""The story of an evaluation: checkpoint, shards, a pass over one split, figures, JSON, MLflow."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dan_dist.data.cache import localise
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.evaluation.groups import (
    GROUPS,
    Groups,
    add_groups,
    judge_groups,
    read_groups,
    write_groups,
)
from dan_dist.evaluation.judge import (
    Details,
    EvaluationResult,
    Rows,
    judge_classes,
    judge_pairs,
)
from dan_dist.evaluation.predictions import predict
from dan_dist.evaluation.records import PREDICTIONS, write_predictions
from dan_dist.evaluation.task import pairs_of, title_of
from dan_dist.model.classes import columns_of, join_names, meet
from dan_dist.model.dan import Output, features, probabilities, probabilities_among
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import EvaluateOptions
from dan_dist.run.results import check_result_folder, result_folder, try_result_folder
from dan_dist.tracking.figures import save
from dan_dist.tracking.inputs import TRAINED_BY, dataset_inputs, model_of
from dan_dist.tracking.tracker import RunRecord, check_recorded, record_run
from shards.files import sha256_of, write_atomically
from shards.format import ShardSet, Split, open_shardset

log = logging.getLogger(__name__)

REPORT = "evaluation.json"
# What a report is of; another of the same replaces it.
OF = ("checkpoint_sha256", "step", "weights", "dataset", "release", "fingerprint", "split",
      "pairs_sha256", "groups_sha256")  # fmt: skip
CONTEXTS = {"train": "train", "val": "val"}  # MLflow's word for a split; any other is a test


class Inputs(NamedTuple):
    """The images of an evaluation, and how a network is judged by them."""

    split: Split
    select: Callable[[Output], Tensor]  # see `engine.evaluate`
    columns: list[int] | None  # of what is selected, in the order in which it is judged; None: all
    judge: Callable[[Rows], EvaluationResult]
    facts: dict[str, Any]  # about the judge, plain values for the JSON file
    groups: Groups | None = None  # of the images, where any are asked for


def main(options: EvaluateOptions, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Evaluates a checkpoint on all ranks, each image once; returns the JSON file's content.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    with session(
        options.device, timeout_s=timeout_s, on_loss=lambda line: None, stacks=options.checkpoint
    ) as (world, heart):
        trained = open_network(options, world)
        if not options.no_tracking:
            world.run_once(lambda: check_recorded(options.experiment or trained.experiment))
        if (given := options.output) is not None:  # before shards are copied
            world.run_once(lambda: try_result_folder(given))
        shards = open_set(options, world)
        inputs = world.run_on_all(lambda: open_inputs(shards, trained, options))
        check_same(trained, shards, inputs, world)
        return evaluate(trained, shards, inputs, options, world, heart)


def open_network(options: EvaluateOptions, world: World) -> Trained:
    """The network of the checkpoint."""
    path, classes = options.checkpoint, options.classes
    return world.run_on_all(lambda: load_trained(path, classes, task=None, weights=options.weights))


def open_set(options: EvaluateOptions, world: World) -> ShardSet:
    """The shards, or this node's copy of them."""
    cached = world.run_once(lambda: localise(options.data, options.cache), per_node=True)
    return world.run_on_all(lambda: open_shardset(cached))


def open_inputs(shards: ShardSet, trained: Trained, options: EvaluateOptions) -> Inputs:
    """The images by which a network is judged, by its task."""
    if trained.task == "expression":
        return open_classes(shards, trained, options)
    if options.groups is not None:
        raise ValueError(f"--groups {options.groups}: {trained.path} is judged by pairs of images")
    return open_pairs(shards, trained, options)


def check_same(trained: Trained, shards: ShardSet, inputs: Inputs, world: World) -> None:
    """Refuses another network, other images or other pairs of them on a rank than on rank 0.

    The fingerprint is of all indexes; that of the split has been looked at as it was read.
    """
    world.check_equal(f"{trained.path}: its sha256", sha256_of(trained.path))
    world.check_equal(f"{shards.root}: the images' fingerprint", shards.fingerprint)
    pairs = inputs.facts.get("pairs_sha256", "")
    world.check_equal(f"{shards.root}: the sha256 of the pairs", pairs)


def evaluate(
    trained: Trained, shards: ShardSet, inputs: Inputs, options: EvaluateOptions, world: World,
    heart: Heartbeat,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a network on all ranks; returns the content of the JSON file that rank 0 writes."""
    wanted = wanted_folder(options, trained, shards.dataset, inputs.split.name)
    world.run_once(lambda: check_result_folder(wanted))
    rows = predict(trained, inputs.split, world, heart, options.precision, inputs.select)
    rows = rows if inputs.columns is None else rows[:, inputs.columns]
    details = inputs.judge(rows).details()
    if inputs.groups is not None:
        title = _title(trained, shards, inputs.split)
        details = add_groups(details, judge_groups(rows, inputs.split, inputs.groups), title)
    report = {
        "checkpoint": trained.path.name,
        "checkpoint_sha256": sha256_of(trained.path),
        "step": trained.step,
        "dataset": shards.dataset,
        "release": shards.release,
        "fingerprint": shards.fingerprint,
        "split": inputs.split.name,
        "images": len(inputs.split),
        "weights": options.weights,
        "selected_on": trained.selected_on,
        **details.values,
        **inputs.facts,
    }
    if world.is_main:
        own = {key: report.get(key) for key in OF}
        with result_folder(wanted, REPORT, own) as output:
            if trained.task == "expression":
                facts = {key: report[key] for key in ("fingerprint", "step", "selected_on")}
                write_predictions(output / PREDICTIONS, inputs.split, rows, facts)
            if inputs.groups is not None:
                write_groups(output / GROUPS, report["groups"])
            save_report(report, details, output)
            if not options.no_tracking:
                context = CONTEXTS.get(inputs.split.name, "test")
                used = dataset_inputs(shards, {context: inputs.split}, options.data)
                track(output, report, details, trained, options, used)
        for line in details.lines:
            log.info("%s", line)
        log.info("selected_on: %s; figures and %s: %s", trained.selected_on, REPORT, output)
    return report


def wanted_folder(options: EvaluateOptions, trained: Trained, dataset: str, split: str) -> Path:
    """Where a report goes, if no other lies there: --output, or beside the checkpoint."""
    own = re.sub(r"[^\w.-]", "_", f"{trained.path.stem}-{dataset}-{split}")  # with slashes, perhaps
    return options.output or trained.path.parent / own


def usual_split(shards: ShardSet, name: str | None, trained: Trained) -> str:
    """The name of the split to evaluate: None takes that of the training's own evaluations.

    Where that is not known or is not there, "val" or "test".
    """
    if name is not None:
        return name
    data = trained.config.get("data", {})
    usual = (data.get("test_split"), data.get("val_split"), "val", "test")
    choice = [n for n in usual if n in shards.splits]
    return choice[0] if choice else "val"


def open_split(shards: ShardSet, name: str | None, trained: Trained) -> tuple[list[int], Split]:
    """The split to look at, and where its classes, which are the network's, stand among those.

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
    """A split by whose classes a network is judged, in the shards' order of classes.

    Classes that one side lacks are left out on both, as if neither had heard of them.
    """
    met = meet_classes(shards, trained)
    split = shards.split(usual_split(shards, options.split, trained))
    facts = describe_meeting(met, split, trained)
    columns = [own for own, _ in met]
    is_whole = len(met) == len(trained.class_names)
    select = probabilities if is_whole else partial(probabilities_among, columns)
    split = with_labels(split, [label for _, label in met])
    if not len(split):
        raise ValueError(f"{shards.root}: split '{split.name}' is empty")
    groups = None
    if options.groups is not None:
        groups = read_groups(options.groups, split)
        facts["groups_sha256"] = sha256_of(options.groups)
    judge = partial(judge_classes, split=split, title=_title(trained, shards, split))
    return Inputs(split, select, columns if is_whole else None, judge, facts, groups)


def meet_classes(shards: ShardSet, trained: Trained) -> list[tuple[int, int]]:
    """Each common class, by its place in the network and in the shards.

    Fewer than two are a ValueError.
    """
    own, other = trained.class_names, shards.class_names
    try:
        met = meet(own, other)
    except ValueError as error:
        raise ValueError(f"{trained.path} and {shards.root}: {error}") from error
    if len(met) < 2:
        raise ValueError(
            f"{trained.path} was trained on {len(own)} classes ({join_names(own)}), {shards.root} "
            f"has {len(other)} ({join_names(other)}): {len(met)} in common, at least 2 are needed"
        )
    return met


def describe_meeting(met: list[tuple[int, int]], split: Split, trained: Trained) -> dict[str, Any]:
    """Which class of the network is which of the data, and what is left out; logged if it is."""
    own, other = trained.class_names, split.class_names
    mapping = {own[a]: other[b] for a, b in met}
    counts = np.bincount(split.index["label"], minlength=len(other)).tolist()
    unknown = {n: counts[k] for k, n in enumerate(other) if n not in mapping.values()}
    unused = [name for name in own if name not in mapping]
    if any(a != b for a, b in mapping.items()) or unknown or unused:
        log.info("classes: %s", ", ".join(f"{a} = {b}" for a, b in mapping.items()))
    if unused:
        log.info("left out of the network, as the data has none: %s", ", ".join(unused))
    if unknown:
        named = ", ".join(f"{name} ({count} images)" for name, count in unknown.items())
        log.info("left out of the data, as the network knows none: %s", named)
    return {"classes_met": mapping, "left_out": {"network": unused, "data": unknown}}


def with_labels(split: Split, labels: list[int]) -> Split:
    """The images of these classes alone, which become the split's classes, in this order."""
    if labels == [*range(len(split.class_names))]:
        return split
    place = np.full(len(split.class_names), -1)
    place[labels] = np.arange(len(labels))
    index = np.array(split.index)
    index["label"] = place[index["label"]]
    names = tuple(split.class_names[k] for k in labels)
    return replace(split, index=index[index["label"] >= 0], class_names=names)


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
    judge = partial(judge_pairs, pairs=pairs, title=_title(trained, shards, split))
    return Inputs(own, features, None, judge, facts)


def _title(trained: Trained, shards: ShardSet, split: Split) -> str:
    return f"{trained.name}, {trained.age}, on {title_of(shards, split)}"


def save_report(report: dict[str, Any], details: Details, output: Path) -> None:
    """Draws the figures, and writes the JSON file beside them once they are there."""
    for figure in details.figures:
        save(figure.draw(*figure.values, figure.title), output / figure.name)
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")


def track(
    output: Path, report: dict[str, Any], details: Details, trained: Trained,
    options: EvaluateOptions, used: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """A run of its own in MLflow, which names the training's."""
    where = f"{report['dataset']} ({report['release']}), split {report['split']}"
    model = model_of(trained, options.weights)
    record = RunRecord(
        experiment=options.experiment or trained.experiment,
        name=f"evaluate {trained.name}, {trained.path.stem}, on {where}",
        params={key: report[key] for key in ("checkpoint", "dataset", "release", "split")},
        tags={"kind": "evaluation", TRAINED_BY: (model and model.run_id) or "unknown",
              "fingerprint": report["fingerprint"], "selected_on": report["selected_on"]},
        config=trained.config,
        datasets=used,
        model=model,
    )  # fmt: skip
    metrics = {f"eval/{name}": value for name, value in details.metrics.items()}
    artifacts = [REPORT, *(figure.name for figure in details.figures)]
    artifacts += [PREDICTIONS] if trained.task == "expression" else []
    artifacts += [GROUPS] if "groups" in report else []
    record_run(output, record, metrics=metrics, step=report["step"], artifacts=artifacts)
