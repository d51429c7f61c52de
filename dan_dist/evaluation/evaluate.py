"""The story of an evaluation: checkpoint, shards, a pass over one split, figures, JSON, MLflow."""

import io
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dan_dist.data.cache import localise
from dan_dist.data.loader import Loader, evaluation_loader
from dan_dist.data.reader import Reader
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import PrecisionChoice, evaluate, resolve_precision
from dan_dist.evaluation.figures import confusion_figure, mistakes_figure, reliability_figure
from dan_dist.evaluation.metrics import (
    calibrate,
    class_scores,
    confusion,
    format_metrics,
    summarise,
)
from dan_dist.evaluation.task import judge_pairs as task_pairs
from dan_dist.evaluation.task import pairs_of
from dan_dist.evaluation.verification import Pairs
from dan_dist.model.classes import columns_of, join_names
from dan_dist.model.dan import Output, features, probabilities
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import EvaluateOptions
from dan_dist.tracking.figures import save
from dan_dist.tracking.tracker import RunRecord, record_run
from shards.files import write_atomically
from shards.format import ShardSet, Split, open_shardset

log = logging.getLogger(__name__)

REPORT = "evaluation.json"
MISTAKES = 24  # of the most confident ones


class Mistake(NamedTuple):
    """An image that the network takes for another class."""

    key: str  # <shard>/<key>
    true: str
    predicted: str
    confidence: float


class Findings(NamedTuple):
    """All that is to be said of what a network gives for a split."""

    report: dict[str, Any]  # plain values
    metrics: dict[str, float]  # for MLflow
    figures: dict[str, Callable[[], Figure]]  # what draws them, by their files' names
    lines: list[str]  # for the screen


def main(options: EvaluateOptions, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Evaluates a checkpoint on all ranks, each image once; returns what stands in the JSON file.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    with session(options.device, timeout_s=timeout_s, on_loss=lambda line: None) as (world, heart):
        trained = world.run_on_all(
            lambda: load_trained(options.checkpoint, options.classes, task=None)
        )
        cached = world.run_once(lambda: localise(options.data, options.cache), per_node=True)
        shards = world.run_on_all(lambda: open_shardset(cached))
        outputs = partial(predict, trained, world=world, heart=heart, precision=options.precision)
        name = usual_split(shards, options.split, trained)
        title = f"{shards.dataset}, split '{name}'"
        if trained.task == "identity":
            found, chosen = world.run_on_all(
                lambda: open_pairs(shards.split(name), trained, options.pairs, options.pairs_file)
            )
            findings = judge_pairs(outputs(found, select=features), chosen, title)
            findings.report["pairs_file"] = options.pairs_file and Path(options.pairs_file).name
        else:
            columns, found = world.run_on_all(lambda: open_split(shards, name, trained))
            rows = outputs(found)[:, columns]  # in the shards' order of classes
            findings = judge_classes(rows, found, title)
        # Names from a manifest may hold anything, slashes too.
        own = re.sub(r"[^\w.-]", "_", f"{trained.path.stem}-{shards.dataset}-{found.name}")
        output = options.output or trained.path.parent / own
        report = {
            "checkpoint": trained.path.name,
            "step": trained.step,
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "split": found.name,
            "images": len(found),
            **findings.report,
        }
        if world.is_main:
            output.mkdir(parents=True, exist_ok=True)
            for file, draw in findings.figures.items():
                save(draw(), output / file)
            write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")
            if not options.no_tracking:
                track(output, report, findings, trained, options.experiment)
            for line in findings.lines:
                log.info("%s", line)
            log.info("figures and %s: %s", REPORT, output)
        return report


def usual_split(shards: ShardSet, name: str | None, trained: Trained) -> str:
    """The split to evaluate: None takes that of the training's own evaluations.

    Where that is not known or is not there, "val" or "test".
    """
    if name is not None:
        return name
    usual = [trained.config["data"]["val_split"]] if trained.config else []
    choice = [n for n in (*usual, "val", "test") if n in shards.splits]
    return choice[0] if choice else "val"


def open_split(shards: ShardSet, name: str | None, trained: Trained) -> tuple[list[int], Split]:
    """The split to evaluate, and where its classes stand among the network's.

    name: see `usual_split`.

    Raises:
        FileNotFoundError, ValueError: no shards, no such split, none of its images, other classes.
    """
    columns = columns_of(trained.class_names, shards.class_names)
    if columns is None:
        raise ValueError(
            f"{trained.path} was trained on {len(trained.class_names)} classes "
            f"({join_names(trained.class_names)}), {shards.root} has {len(shards.class_names)} "
            f"({join_names(shards.class_names)})"
        )
    found = shards.split(usual_split(shards, name, trained))
    if not len(found):
        raise ValueError(f"{shards.root}: split '{found.name}' is empty")
    return columns, found


def open_pairs(
    split: Split, trained: Trained, pairs: int | None, pairs_file: str | None
) -> tuple[Split, Pairs]:
    """The images by whose pairs a network that was trained on identities is judged, and those.

    Raises:
        as `pairs_of`.
    """
    count = trained.config["data"]["pairs"] if pairs is None else pairs
    found, chosen = pairs_of(split, pairs=count, pairs_file=pairs_file)
    persons = {split.class_names[k] for k in np.unique(found.index["label"]).tolist()}
    if known := persons.intersection(trained.class_names):
        log.warning("%d of %d persons have names that training knows as well: %s", len(known),
                    len(persons), join_names(sorted(known)))  # fmt: skip
    return found, chosen


def predict(
    trained: Trained,
    split: Split,
    world: World,
    heart: Heartbeat,
    precision: PrecisionChoice,
    select: Callable[[Output], Tensor] = probabilities,
) -> NDArray[np.float32]:
    """(images, D) by a network from a file, in index order, the same on every rank.

    select: the part of the network's output that is wanted, see `evaluate`; by default (images,
    classes) probabilities.

    Raises:
        ValueError: what the network gives is not finite: its weights are not, or are too large.
    """
    if precision == "auto" and trained.config:
        precision = trained.config["train"]["precision"]
    resolved = resolve_precision(precision, world.device)
    dtype = torch.float64 if resolved == "float64" else torch.float32
    network = trained.network.to(world.device, dtype).to(memory_format=torch.channels_last)
    with open_loader(trained, split, world) as loader:
        found = evaluate(
            network, loader, world, select=select, bf16=resolved == "bf16", heart=heart
        )
    if bad := int((~np.isfinite(found)).any(axis=1).sum()):
        raise ValueError(
            f"{trained.path}: the output is not finite for {bad} of {len(found)} images"
        )
    return found


def open_loader(trained: Trained, split: Split, world: World) -> Loader:
    """This rank's part of a pass over a split, in the size that a network wants."""
    return evaluation_loader(
        split,
        rank=world.rank,
        world_size=world.size,
        image_size=trained.image_size,
        device=world.device,
        threads=world.cores,
    )


def judge_classes(probabilities: NDArray[np.float32], split: Split, title: str) -> Findings:
    """Scores, calibration and the surest mistakes of each image's class."""
    labels, names = split.index["label"], split.class_names
    matrix, calibration = confusion(probabilities, labels), calibrate(probabilities, labels)
    scores, per_class = summarise(matrix, names), class_scores(matrix, names)
    whole = {
        "accuracy": scores["accuracy"],
        "mean_recall": scores["mean_recall"],
        "calibration_error": calibration.error,
    }
    metrics = {f"eval/{key}": value for key, value in whole.items()}
    for name, own in per_class.items():
        metrics |= {f"eval/{key}/{name}": own[key] for key in ("precision", "recall", "f1")}
    chosen = worst(probabilities, labels)
    mistakes = [
        Mistake(
            split.key(k), names[labels[k]], names[probabilities[k].argmax()],
            float(probabilities[k].max()),
        )
        for k in chosen
    ]  # fmt: skip
    report = {
        **whole,
        "classes": per_class,
        "confusion_matrix": matrix.tolist(),
        "calibration": {
            "images": calibration.images.tolist(),
            "confidence": calibration.confidence.tolist(),
            "accuracy": calibration.accuracy.tolist(),
        },
        "mistakes": [mistake._asdict() for mistake in mistakes],
    }
    figures: dict[str, Callable[[], Figure]] = {
        "confusion_matrix.png": partial(confusion_figure, matrix, names, title),
        "reliability.png": partial(reliability_figure, calibration, title),
        "mistakes.png": lambda: mistakes_figure(read_images(split, chosen), mistakes, title),
    }
    return Findings(
        report,
        metrics,
        figures,
        [*table(per_class), f"{format_metrics(whole)}, {len(labels)} images"],
    )


def judge_pairs(features: NDArray[np.float32], pairs: Pairs, title: str) -> Findings:
    """How well pairs of one person are told from pairs of two."""
    verdict = task_pairs(pairs, features, title)
    name, draw, values = verdict.figure
    return Findings(
        {"pairs": len(pairs.same), **verdict.metrics},
        {f"eval/{key}": value for key, value in verdict.metrics.items()},
        {name: partial(draw, *values)},
        [f"{format_metrics(verdict.metrics)}, {len(pairs.same)} pairs"],
    )


def worst(probabilities: NDArray[np.float32], labels: NDArray[np.integer]) -> list[int]:
    """The wrongly classified images of which the network is surest, at most MISTAKES, in order."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    surest = np.argsort(-probabilities[wrong].max(axis=1), kind="stable")
    return [int(k) for k in wrong[surest[:MISTAKES]]]


def read_images(split: Split, samples: list[int]) -> list[Image.Image]:
    """Images of a split as they are."""
    reader = Reader(split, max_bad=0)
    images = [Image.open(io.BytesIO(reader.read(k).tobytes())).convert("RGB") for k in samples]
    reader.close()
    return images


def track(
    output: Path, report: dict[str, Any], findings: Findings, trained: Trained,
    experiment: str | None,
) -> None:  # fmt: skip
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
    artifacts = (REPORT, *findings.figures)
    record_run(output, record, metrics=findings.metrics, step=report["step"], artifacts=artifacts)


def table(classes: dict[str, dict[str, float]]) -> list[str]:
    """Each class's scores as lines."""
    width = max(map(len, classes))
    return [
        f"{'':{width}}  precision  recall      F1  images",
        *(
            f"{name:{width}}  {100 * s['precision']:8.2f} %  {100 * s['recall']:5.2f} %  "
            f"{s['f1']:.4f}  {s['images']:6d}"
            for name, s in classes.items()
        ),
    ]
