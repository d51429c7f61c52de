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

from dan_dist import checkpoint
from dan_dist.cache import localise
from dan_dist.data import Reader, evaluation_stream
from dan_dist.engine import class_probabilities
from dan_dist.figures import confusion_figure, mistakes_figure, reliability_figure, save
from dan_dist.journal import forget
from dan_dist.metrics import calibrate, class_scores, confusion, summarise
from dan_dist.model import DAN
from dan_dist.pulse import Pulse, joined
from dan_dist.shardset import Split, open_shardset, write_atomically
from dan_dist.tracking import MlflowTracker
from dan_dist.world import World, core_count

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
    cache: str | None = None,
    output: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    experiment: str | None = None,
    tracked: bool = True,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Evaluates a checkpoint on all ranks, each image once; returns what stands in the JSON file.

    path: a checkpoint, or the folder of a run, whose best one is taken. data: folder or URL of
    shards. split: by default that of the training's own evaluations. output: by default a folder
    beside the checkpoint, named after it, data set and split. precision: "auto" takes that of the
    training's own evaluations on this device.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    with joined(device, timeout_s=timeout_s, on_loss=lambda line: None) as (world, pulse):
        path = path / checkpoint.BEST if path.is_dir() else path
        content = world.together(lambda: load(path))
        split = split or content["config"]["data"]["val_split"]
        cached = world.once(lambda: localise(data, cache), per_node=True)
        found = world.together(lambda: open_split(cached, split, content["class_names"], path))
        shards = open_shardset(cached)
        probabilities = predict(content, found, shards.image_size, world, pulse, precision)
        # Names from a manifest may hold anything, slashes too.
        name = re.sub(r"[^\w.-]", "_", f"{path.stem}-{shards.dataset}-{split}")
        output = output or path.parent / name
        report = {
            "checkpoint": path.name,
            "step": content["step"],
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "split": split,
            **describe(probabilities, found),
        }
        if world.is_main:
            write(output, report, probabilities, found)
            if tracked:
                name = experiment or content["config"]["tracking"]["experiment"]
                track(output, report, content, name)
            tell(report, output)
        return report


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of a training.

    Raises:
        FileNotFoundError: no such file. ValueError: not one of ours, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return checkpoint.load(path)


def open_split(folder: str, split: str, class_names: list[str], path: Path) -> Split:
    """The split to evaluate, whose classes must be the checkpoint's, by name and order.

    Raises:
        FileNotFoundError, ValueError: no shards, no such split, none of its images, other classes.
    """
    shards = open_shardset(folder)
    if tuple(class_names) != shards.class_names:
        raise ValueError(
            f"{path} was trained on {len(class_names)} classes ({', '.join(class_names)}), "
            f"{shards.root} has {len(shards.class_names)} ({', '.join(shards.class_names)})"
        )
    found = shards.split(split)
    if not len(found):
        raise ValueError(f"{shards.root}: split '{split}' is empty")
    return found


def predict(
    content: dict[str, Any],
    split: Split,
    shard_image_size: int | None,
    world: World,
    pulse: Pulse,
    precision: str,
) -> NDArray[np.float32]:
    """(images, classes) by the network of a checkpoint, in index order, the same on every rank."""
    config = content["config"]
    network = DAN(len(content["class_names"]), config["model"]["heads"])
    prefix = "network."
    weights = content["objective"]
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    if precision == "auto":
        precision = config["train"]["precision"]
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "float32"
    dtype = torch.float64 if precision == "float64" else torch.float32
    network.to(world.device, dtype).to(memory_format=torch.channels_last)
    stream, steps = evaluation_stream(
        split,
        rank=world.rank,
        world_size=world.size,
        image_size=config["model"]["image_size"],
        shard_image_size=shard_image_size,
        device=world.device,
        threads=max(1, core_count() // world.local_size),
    )
    try:
        return class_probabilities(
            network.eval(), stream, steps, world, bf16=precision == "bf16", advance=pulse.advance
        )
    finally:
        stream.close()


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


def track(output: Path, report: dict[str, Any], content: dict[str, Any], experiment: str) -> None:
    """A run of its own in MLflow, which names the training's."""
    forget(output)
    where = f"{report['dataset']}-{report['split']}"
    trained = Path(content["config"]["train"]["output"]).name
    tracker = MlflowTracker(
        output,
        experiment=experiment,
        run_name=f"evaluate {trained} on {where}",
        parent=None,
        params={key: report[key] for key in ("checkpoint", "dataset", "release", "split")},
        config=content["config"],
        tags={"kind": "evaluation", "trained_by": content["run_id"] or "unknown",
              "fingerprint": report["fingerprint"]},
    )  # fmt: skip
    values = {f"eval/{k}": report[k] for k in ("accuracy", "mean_recall", "calibration_error")}
    for name, scores in report["classes"].items():
        values |= {f"eval/{key}/{name}": scores[key] for key in ("precision", "recall", "f1")}
    tracker.metrics(values, report["step"])
    for name in (REPORT, "confusion_matrix.png", "reliability.png", "mistakes.png"):
        tracker.artifact(output / name, "")
    tracker.end("FINISHED")


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
