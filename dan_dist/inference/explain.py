"""The story of a look inside: where each head looks, how the features lie; figures, JSON, MLflow.

Grad-CAM++ (Chattopadhyay et al., arXiv 1710.11063) shows where heads look, as in figure 1 of the
paper; t-SNE shows how features lie, as in its figure 3.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dan_dist.distributed.heartbeat import session
from dan_dist.inference.explanation import Explanation, examine
from dan_dist.inference.figures import attention_figure, features_figure
from dan_dist.inference.inputs import Inputs, open_inputs
from dan_dist.inference.metrics import project
from dan_dist.model.weights import load_trained
from dan_dist.options import ExplainOptions, Weights
from dan_dist.run.results import check_result_folder, result_folder, try_result_folder
from dan_dist.tracking.figures import save
from dan_dist.tracking.inputs import TRAINED_BY, model_of
from dan_dist.tracking.tracker import RunRecord, check_recorded, record_run
from shards.files import scratch_folder, sha256_of, write_atomically

log = logging.getLogger(__name__)

REPORT = "explanation.json"
OF = ("seen_sha256",)  # what a report is of; another of the same replaces it
ATTENTION = ("attention.png", "attention-against.png")  # of each network
FEATURES = "features.png"
MOST_FACES = 100  # rows of the figure of maps


def main(options: ExplainOptions) -> dict[str, Any]:
    """Looks into one network or two; returns the JSON file's content.

    Raises:
        ValueError, OSError: bad input, or a library is missing; in one line, before anything is
            computed.
    """
    check(options)
    require_libraries()
    with (
        session(options.device, timeout_s=60.0, on_loss=lambda line: None) as (world, _),
        scratch_folder() as folder,
    ):
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: explain runs as one")
        given = [p for p in (options.checkpoint, options.against) if p is not None]
        networks = [load_trained(p, options.classes, weights=options.weights) for p in given]
        if not options.no_tracking:
            check_recorded(options.experiment or networks[0].experiment)
        if options.output is not None:  # before shards are copied and images packed
            try_result_folder(options.output)
        inputs = open_inputs(options, networks, folder, world.cores)
        path = networks[0].path
        name = re.sub(r"[^\w.-]", "_", f"{path.stem}-explained-{inputs.where}")
        wanted = options.output or path.parent / name
        check_result_folder(wanted)
        explanations = [examine(trained, inputs, options.count, world) for trained in networks]
    report = describe(explanations, inputs, options.weights)
    with result_folder(wanted, REPORT, {key: report[key] for key in OF}) as output:
        write(output, report, explanations, inputs)
        if not options.no_tracking:
            track(output, report, explanations, inputs, options)
    log_numbers(explanations)
    log.info("figures and %s: %s", REPORT, output)
    return report


def check(options: ExplainOptions) -> None:
    """Refuses options that do not go together."""
    if not options.images and options.data is None:
        raise ValueError("nothing to look at: name images, or shards by --data")
    if options.data is None and (options.split or options.cache):
        raise ValueError("--split and --cache belong to --data")
    if not 1 <= options.count <= MOST_FACES:
        raise ValueError(f"--count {options.count}: expected 1 to {MOST_FACES} faces")


def require_libraries() -> None:
    """Imports what only a look inside needs, which takes seconds."""
    try:
        import_module("pytorch_grad_cam")
    except ImportError as error:
        raise OSError(f"{error}: pip install -e '.[explain]' brings what explain needs") from error


def describe(
    explanations: Sequence[Explanation], inputs: Inputs, weights: Weights
) -> dict[str, Any]:
    """The first network's description, the images', and the other network's under "against".

    weights: those of the networks, as they were asked for.
    """
    first, *others = [explanation.describe() for explanation in explanations]
    return {
        **first,
        **inputs.origin,
        "images": len(inputs.faces.split),
        "feature_images": len(inputs.labelled) if inputs.labelled else 0,
        "unread": {str(path): fault for path, fault in inputs.faces.faults.items()},
        "against": others[0] if others else None,
        "seen_sha256": seen(explanations, inputs, weights),
    }


def seen(explanations: Sequence[Explanation], inputs: Inputs, weights: Weights) -> str:
    """A digest of the first network and the images: a look at other ones is another result."""
    own = sha256_of(explanations[0].trained.path)
    digest = hashlib.sha256(json.dumps([own, weights, inputs.faces.names, inputs.origin]).encode())
    for split in filter(None, (inputs.faces.split, inputs.labelled)):
        digest.update(split.index.tobytes())
    return digest.hexdigest()


def write(
    output: Path, report: dict[str, Any], explanations: Sequence[Explanation], inputs: Inputs
) -> None:
    """The figures, and the JSON file beside them once they are there."""
    for name in (*ATTENTION, FEATURES, REPORT):  # of a former look
        (output / name).unlink(missing_ok=True)
    split = f"{inputs.origin['dataset']}, split '{inputs.origin['split']}'"
    where = "given images" if inputs.faces.true[0] is None else split
    for name, own in zip(ATTENTION, explanations, strict=False):
        save(attention_figure(own.faces, own.panels, own.title(where)), output / name)
    if (labelled := inputs.labelled) is not None:
        panes = []
        for own in explanations:
            assert own.features is not None
            log.info("%s: t-SNE", own.trained.path)
            panes.append((own.heading(), project(own.features)))
        title = f"Pooled features of {len(labelled)} images by t-SNE: {split}"
        figure = features_figure(panes, labelled.index["label"], labelled.class_names, title)
        save(figure, output / FEATURES)
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")


def track(
    output: Path, report: dict[str, Any], explanations: Sequence[Explanation], inputs: Inputs,
    options: ExplainOptions,
) -> None:  # fmt: skip
    """A run of its own in MLflow, which names the first network's training."""
    first, *others = explanations
    metrics: dict[str, float] = {}
    keys = ("checkpoint", "dataset", "release", "split")
    params = {key: report[key] for key in keys if report[key] is not None}
    for other in others:
        params |= {"against_run": other.trained.name, "against_checkpoint": other.trained.path.name}
    for ending, own in zip(("", "_against"), explanations, strict=False):
        numbers = {"head_overlap": own.overlap, "class_separation": own.separation}
        known = {key: value for key, value in numbers.items() if not math.isnan(value)}
        metrics |= {f"explain/{key}{ending}": value for key, value in known.items()}
    trained, model = first.trained, model_of(first.trained, options.weights)
    record = RunRecord(
        experiment=options.experiment or trained.experiment,
        name=f"explain {trained.name}, {trained.path.stem}, on {inputs.where}",
        params=params,
        tags={"kind": "explanation", TRAINED_BY: (model and model.run_id) or "unknown",
              "fingerprint": report["fingerprint"] or "unknown"},
        config=trained.config,
        datasets=inputs.datasets,
        model=model,
    )  # fmt: skip
    drawn = [name for name in (*ATTENTION, FEATURES) if (output / name).is_file()]
    record_run(output, record, metrics=metrics, step=trained.step, artifacts=(REPORT, *drawn))


def log_numbers(explanations: Sequence[Explanation]) -> None:
    """The numbers, a few lines a network."""
    for own in explanations:
        name = f"{own.trained.name}, {own.trained.path.name}"
        if len(own.overlaps):
            log.info(
                "%s: overlap of heads %.3f over %d images (1 the same places, 0 none in common)",
                name, own.overlap, len(own.overlaps),
            )  # fmt: skip
        if own.features is not None and not math.isnan(own.separation):
            log.info(
                "%s: distance between classes : within classes %.3f over %d images",
                name, own.separation, len(own.features),
            )  # fmt: skip
        if any(own.empty.values()):
            counts = ", ".join(f"{n} of {panel}" for panel, n in own.empty.items() if n)
            log.info("%s: maps that are the same everywhere, and so empty: %s", name, counts)
