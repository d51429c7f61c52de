"""The story of an evaluation: checkpoint, shards, a pass over one split, figures, JSON, MLflow."""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dan_dist.cache import localise
from dan_dist.data import Reader, Stream, evaluation_stream
from dan_dist.engine import Wanted, class_probabilities, resolve_precision
from dan_dist.figures import confusion_figure, mistakes_figure, reliability_figure, save
from dan_dist.metrics import calibrate, class_scores, confusion, summarise
from dan_dist.pulse import Pulse, joined
from dan_dist.shardset import ShardSet, Split, open_shardset, write_atomically
from dan_dist.tracking import record_run
from dan_dist.weights import Trained, columns_of, load_trained
from dan_dist.world import World

log = logging.getLogger(__name__)

REPORT = "evaluation.json"
MISTAKES = 24  # of the most confident ones


class Mistake(NamedTuple):
    """An image that the network takes for another class."""

    key: str  # <shard>/<key>
    true: str
    predicted: str
    confidence: float


def main(
    path: Path,
    data: str,
    *,
    split: str | None = None,
    classes: str | None = None,
    cache: str | None = None,
    output: Path | None = None,
    device: str = "auto",
    precision: Wanted = "auto",
    experiment: str | None = None,
    tracked: bool = True,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Evaluates a checkpoint on all ranks, each image once; returns what stands in the JSON file.

    path, classes: see `load_trained`. data: folder or URL of shards. split: by default that of the
    training's own evaluations. output: by default a folder beside the checkpoint, named after it,
    data set and split. precision: "auto" takes that of the training's own evaluations on this
    device.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    with joined(device, timeout_s=timeout_s, on_loss=lambda line: None) as (world, pulse):
        trained = world.together(lambda: load_trained(path, classes))
        cached = world.once(lambda: localise(data, cache), per_node=True)
        shards = world.together(lambda: open_shardset(cached))
        columns, found = world.together(lambda: open_split(shards, split, trained))
        probabilities = predict(trained, found, shards.image_size, world, pulse, precision)
        probabilities = probabilities[:, columns]  # in the shards' order of classes
        # Names from a manifest may hold anything, slashes too.
        name = re.sub(r"[^\w.-]", "_", f"{trained.path.stem}-{shards.dataset}-{found.name}")
        output = output or trained.path.parent / name
        report = {
            "checkpoint": trained.path.name,
            "step": trained.step,
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "split": found.name,
            **describe(probabilities, found),
        }
        if world.is_main:
            write(output, report, probabilities, found)
            if tracked:
                track(output, report, trained, experiment)
            tell(report, output)
        return report


def open_split(shards: ShardSet, name: str | None, trained: Trained) -> tuple[list[int], Split]:
    """The split to evaluate, and where its classes stand among the network's.

    name: None takes that of the training's own evaluations; where that is not known or is not
    there, "val" or "test".

    Raises:
        FileNotFoundError, ValueError: no shards, no such split, none of its images, other classes.
    """
    columns = columns_of(trained.class_names, shards.class_names)
    if columns is None:
        names = ", ".join(trained.class_names)
        raise ValueError(
            f"{trained.path} was trained on {len(trained.class_names)} classes ({names}), "
            f"{shards.root} has {len(shards.class_names)} ({', '.join(shards.class_names)})"
        )
    if name is None:
        usual = [trained.config["data"]["val_split"]] if trained.config else []
        choice = [n for n in (*usual, "val", "test") if n in shards.splits]
        name = choice[0] if choice else "val"
    found = shards.split(name)
    if not len(found):
        raise ValueError(f"{shards.root}: split '{found.name}' is empty")
    return columns, found


def predict(
    trained: Trained,
    split: Split,
    shard_image_size: int | None,
    world: World,
    pulse: Pulse,
    precision: Wanted,
) -> NDArray[np.float32]:
    """(images, classes) by a network from a file, in index order, the same on every rank.

    Raises:
        ValueError: what the network gives is not finite: its weights are not, or are too large.
    """
    if precision == "auto" and trained.config:
        precision = trained.config["train"]["precision"]
    resolved = resolve_precision(precision, world.device)
    dtype = torch.float64 if resolved == "float64" else torch.float32
    network = trained.network.to(world.device, dtype).to(memory_format=torch.channels_last)
    stream, steps = open_stream(trained, split, shard_image_size, world)
    try:
        found = class_probabilities(
            network, stream, steps, world, bf16=resolved == "bf16", advance=pulse.advance
        )
    finally:
        stream.close()
    if bad := int((~np.isfinite(found)).any(axis=1).sum()):
        raise ValueError(
            f"{trained.path}: the output is not finite for {bad} of {len(found)} images"
        )
    return found


def open_stream(
    trained: Trained, split: Split, shard_image_size: int | None, world: World
) -> tuple[Stream, int]:
    """This rank's part of a pass over a split, in the size that a network wants, and its steps."""
    return evaluation_stream(
        split,
        rank=world.rank,
        world_size=world.size,
        image_size=trained.image_size,
        shard_image_size=shard_image_size,
        device=world.device,
        threads=world.cores,
    )


def describe(probabilities: NDArray[np.float32], split: Split) -> dict[str, Any]:
    """All that is to be said of a split's predictions, as plain values."""
    labels = split.index["label"]
    matrix = confusion(probabilities, labels)
    scores, calibration = summarise(matrix, split.class_names), calibrate(probabilities, labels)
    return {
        "images": len(labels),
        "accuracy": scores["accuracy"],
        "mean_recall": scores["mean_recall"],
        "calibration_error": calibration.error,
        "classes": class_scores(matrix, split.class_names),
        "confusion_matrix": matrix.tolist(),
        "calibration": {
            "images": calibration.images.tolist(),
            "confidence": calibration.confidence.tolist(),
            "accuracy": calibration.accuracy.tolist(),
        },
        "mistakes": [
            Mistake(
                split.key(k), split.class_names[labels[k]],
                split.class_names[probabilities[k].argmax()], float(probabilities[k].max()),
            )._asdict()
            for k in worst(probabilities, labels)
        ],
    }  # fmt: skip


def worst(probabilities: NDArray[np.float32], labels: NDArray[np.integer]) -> list[int]:
    """The wrongly classified images of which the network is surest, at most MISTAKES, in order."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    surest = np.argsort(-probabilities[wrong].max(axis=1), kind="stable")
    return [int(k) for k in wrong[surest[:MISTAKES]]]


def write(
    output: Path, report: dict[str, Any], probabilities: NDArray[np.float32], split: Split
) -> None:
    """The JSON file, and the figures beside it."""
    output.mkdir(parents=True, exist_ok=True)
    labels, names = split.index["label"], split.class_names
    reader = Reader(split, max_bad=0)
    chosen = worst(probabilities, labels)
    images = [Image.open(io.BytesIO(reader.read(k).tobytes())).convert("RGB") for k in chosen]
    reader.close()
    mistakes = [Mistake(**m) for m in report["mistakes"]]
    title = f"{report['dataset']}, split '{report['split']}'"
    for name, figure in (
        ("confusion_matrix.png", confusion_figure(confusion(probabilities, labels), names, title)),
        ("reliability.png", reliability_figure(calibrate(probabilities, labels), title)),
        ("mistakes.png", mistakes_figure(images, mistakes, title)),
    ):
        save(figure, output / name)
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")


def track(output: Path, report: dict[str, Any], trained: Trained, experiment: str | None) -> None:
    """A run of its own in MLflow, which names the training's."""
    where = f"{report['dataset']}-{report['split']}"
    values = {f"eval/{k}": report[k] for k in ("accuracy", "mean_recall", "calibration_error")}
    for name, scores in report["classes"].items():
        values |= {f"eval/{key}/{name}": scores[key] for key in ("precision", "recall", "f1")}
    record_run(
        output,
        experiment=experiment or trained.experiment,
        run_name=f"evaluate {trained.name} on {where}",
        params={key: report[key] for key in ("checkpoint", "dataset", "release", "split")},
        tags={"kind": "evaluation", "trained_by": trained.run_id or "unknown",
              "fingerprint": report["fingerprint"]},
        config=trained.config,
        metrics=values,
        step=report["step"],
        artifacts=(REPORT, "confusion_matrix.png", "reliability.png", "mistakes.png"),
    )  # fmt: skip


def tell(report: dict[str, Any], output: Path) -> None:
    """The result as a table."""
    width = max(map(len, report["classes"]))
    log.info("%-*s  precision  recall      F1  images", width, "")
    for name, s in report["classes"].items():
        log.info(
            "%-*s  %8.2f %%  %5.2f %%  %.4f  %6d",
            width, name, 100 * s["precision"], 100 * s["recall"], s["f1"], s["images"],
        )  # fmt: skip
    log.info(
        "accuracy %.2f %%, mean recall %.2f %%, calibration error %.2f %%, %d images",
        100 * report["accuracy"], 100 * report["mean_recall"],
        100 * report["calibration_error"], report["images"],
    )  # fmt: skip
    log.info("figures and %s: %s", REPORT, output)
