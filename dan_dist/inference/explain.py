"""The story of a look inside: where each head looks, how the features lie; figures, JSON, MLflow.

Where heads look is told by Grad-CAM++ (Chattopadhyay et al., arXiv 1710.11063), as in figure 1 of
the paper; how features lie by t-SNE, as in its figure 3.
"""

import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data.augment import MEAN, STD
from dan_dist.data.cache import localise
from dan_dist.data.crops import find_images, pack_images
from dan_dist.data.sampler import epoch_order, group_samples
from dan_dist.distributed.heartbeat import session
from dan_dist.distributed.world import World
from dan_dist.evaluation.evaluate import open_loader, open_split
from dan_dist.inference.attention import STRIDE, attention_maps
from dan_dist.inference.figures import attention_figure, features_figure
from dan_dist.inference.metrics import class_separation, head_overlap
from dan_dist.model.classes import columns_of
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import ExplainOptions
from dan_dist.tracking.figures import save
from dan_dist.tracking.tracker import RunRecord, record_run
from shards.files import write_atomically
from shards.format import ShardSet, Split, open_shardset

log = logging.getLogger(__name__)

REPORT = "explanation.json"
ATTENTION, OTHER_ATTENTION, FEATURES = "attention.png", "attention-against.png", "features.png"
FACES, MOST_FACES = 8, 100  # rows of the figure of maps
OVERLAP_IMAGES = 256  # of a split, of which maps are made
FEATURE_IMAGES = 2000  # of a split, of which features are drawn
PERPLEXITY = 30.0  # of t-SNE, scikit-learn's own


class Face(NamedTuple):
    """A face, what the network says of it, and where it looks."""

    name: str  # a file, or <shard>/<key>
    image: NDArray[np.float32]  # (S, S, 3) RGB, 0 to 1
    true: str | None  # None where it is not known
    predicted: str
    probability: float
    maps: NDArray[np.float32]  # (panels, S, S); see `attention_maps`


class Material(NamedTuple):
    """The images that networks are looked at with."""

    faces: Split  # of these, maps are made
    names: list[str]  # of the faces
    true: list[str | None]
    labelled: Split | None  # of these, features are drawn
    shards: ShardSet | None  # where those come from
    faults: dict[Path, str]  # given images that could not be read


class Finding(NamedTuple):
    """What was found of one network."""

    trained: Trained
    faces: list[Face]  # the first ones
    overlaps: NDArray[np.float64]  # of the heads, of each image where two have a map
    empty: dict[str, int]  # panel → its maps that are the same everywhere
    features: NDArray[np.float32] | None  # (labelled images, 512)
    separation: float  # of the classes; NaN where it cannot be told

    @property
    def label(self) -> str:
        """What figures call the network."""
        own = self.trained
        return f"{own.name}/{own.path.name}" if own.config else own.path.name

    @property
    def overlap(self) -> float:
        """The images' mean; NaN without any."""
        return float(self.overlaps.mean()) if len(self.overlaps) else math.nan


def main(options: ExplainOptions) -> dict[str, Any]:
    """Looks into a network; returns what stands in the JSON file.

    Raises:
        ValueError, OSError: bad input, or a library is missing; in one line, before anything is
            computed.
    """
    if not options.images and options.data is None:
        raise ValueError("nothing to look at: name images, or shards by --data")
    if options.data is None and (options.split or options.cache):
        raise ValueError("--split and --cache belong to --data")
    if not 1 <= options.count <= MOST_FACES:
        raise ValueError(f"--count {options.count}: expected 1 to {MOST_FACES} faces")
    require_libraries()
    with (
        session(options.device, timeout_s=60.0, on_loss=lambda line: None) as (world, _),
        tempfile.TemporaryDirectory(prefix="dan_dist-") as folder,
    ):
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: explain runs as one")
        given = [p for p in (options.checkpoint, options.against) if p is not None]
        networks = [load_trained(p, options.classes) for p in given]
        shards, labelled = None, None
        if options.data is not None:
            shards = open_shardset(localise(options.data, options.cache))
            labelled = open_labelled(shards, options.split, networks)
        if options.images:
            material = stage_given(
                options.images, Path(folder), networks, shards, labelled, world.cores
            )
        else:
            assert shards is not None and labelled is not None
            material = first_faces(shards, labelled)
        findings = [examine(trained, material, options.count, world) for trained in networks]
    report = describe(findings, material)
    name = re.sub(r"[^\w.-]", "_", f"{networks[0].path.stem}-explained-{_where(report)}")
    output = options.output or networks[0].path.parent / name
    write(output, report, findings, material)
    if not options.no_tracking:
        track(output, report, networks[0], options.experiment)
    tell(report, output)
    return report


def require_libraries() -> None:
    """Imports what only a look inside needs, which takes seconds.

    Raises:
        OSError: one is not installed.
    """
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:
        raise OSError(f"{error}: pip install -e '.[explain]' brings what explain needs") from error


def open_labelled(shards: ShardSet, name: str | None, networks: Sequence[Trained]) -> Split:
    """The images of a split whose features are drawn, evenly over the classes, these in turn.

    Raises:
        FileNotFoundError, ValueError: as `open_split`, for any of the networks.
    """
    _, split = open_split(shards, name, networks[0])
    for other in networks[1:]:
        open_split(shards, split.name, other)
    return evenly(split, FEATURE_IMAGES)


def evenly(split: Split, count: int) -> Split:
    """At most `count` images of a split, the classes in turn, none twice; always the same ones.

    No class has more than its share of `count`; those of fewer images have all.
    """
    groups = group_samples(split.index["label"], balanced=True)
    turns = epoch_order(groups, global_batch=min(count, len(split)), seed=0, epoch=0)[0]
    _, first = np.unique(turns, return_index=True)  # in small classes, images come round again
    return replace(split, index=split.index[turns[np.sort(first)]])


def first_faces(shards: ShardSet, labelled: Split) -> Material:
    """Faces that shards give: the first of the labelled images."""
    faces = replace(labelled, index=labelled.index[:OVERLAP_IMAGES])
    names = [faces.key(k) for k in range(len(faces))]
    true: list[str | None] = [shards.class_names[k] for k in faces.index["label"]]
    return Material(faces, names, true, labelled, shards, {})


def stage_given(
    given: Sequence[Path],
    folder: Path,
    networks: Sequence[Trained],
    shards: ShardSet | None,
    labelled: Split | None,
    threads: int,
) -> Material:
    """Faces that a person gives, staged in `folder`; those that cannot be read are named.

    Raises:
        FileNotFoundError: as `find_images`. ValueError: none could be read.
    """
    size = max(trained.image_size for trained in networks)
    paths = find_images(given)
    staged = pack_images(paths, folder, networks[0].class_names, size=size, threads=threads)
    for path, fault in staged.faults.items():
        log.warning("left out %s: %s", path, fault)
    if not staged.paths:
        raise ValueError(f"none of {len(paths)} images could be read")
    names = [str(path) for path in staged.paths]
    return Material(staged.split, names, [None] * len(names), labelled, shards, staged.faults)


def examine(trained: Trained, material: Material, count: int, world: World) -> Finding:
    """Maps of all faces, the first `count` of them kept; features and how the classes lie."""
    trained.network.to(world.device, torch.float32).to(memory_format=torch.channels_last)
    panels = panel_names(len(trained.network.heads))
    names = names_in_shards(trained, material.shards)
    faces: list[Face] = []
    overlaps: list[float] = []
    empty = np.zeros(len(panels), np.int64)
    log.info("%s: maps of %d faces", trained.path, len(material.faces))
    for images in batches(trained, material.faces, world):
        logits, maps = attention_maps(trained.network, images)
        probabilities = logits.softmax(dim=1).cpu().numpy()
        pixels = images.permute(0, 2, 3, 1).cpu() * torch.tensor(STD) + torch.tensor(MEAN)
        for row, image, own in zip(probabilities, pixels.clip(0, 1).numpy(), maps, strict=True):
            if (k := len(overlaps)) < count:
                said = names[row.argmax()], float(row.max())
                faces.append(Face(material.names[k], image, material.true[k], *said, own))
            overlaps.append(head_overlap(own[:-1]))
            empty += ~own.any(axis=(1, 2))
    features, separation = None, math.nan
    if material.labelled is not None:
        assert material.shards is not None
        log.info("%s: features of %d images", trained.path, len(material.labelled))
        features = pooled(trained, material.labelled, world)
        separation = class_separation(features, material.labelled.index["label"])
    known = np.array(overlaps)[~np.isnan(overlaps)]
    counts = dict(zip(panels, empty.tolist(), strict=True))
    return Finding(trained, faces, known, counts, features, separation)


def panel_names(heads: int) -> tuple[str, ...]:
    """What the maps of a network of so many heads are called, in their order."""
    return (*(f"head {k + 1}" for k in range(heads)), "fused" if heads else "backbone")


def names_in_shards(trained: Trained, shards: ShardSet | None) -> list[str]:
    """The network's classes, in the words of the shards where there are any."""
    names = list(trained.class_names)
    if shards is not None:
        columns = columns_of(trained.class_names, shards.class_names)
        assert columns is not None  # open_split has looked
        for name, column in zip(shards.class_names, columns, strict=True):
            names[column] = name
    return names


def batches(trained: Trained, split: Split, world: World) -> Iterator[Tensor]:
    """All images of a split in order, as evaluations see them: (n, 3, S, S) float32, normalised."""
    with open_loader(trained, split, world) as loader:
        for _ in range(loader.order.steps):
            batch = next(loader)
            yield batch.images[: int((batch.ids >= 0).sum())]  # padding stands at the end


@torch.no_grad()
def pooled(trained: Trained, split: Split, world: World) -> NDArray[np.float32]:
    """(images, 512) float32: the pooled backbone features, which the FCN losses cluster."""
    found = [trained.network(x).features.cpu() for x in batches(trained, split, world)]
    features: NDArray[np.float32] = torch.cat(found).numpy()
    return features


def project(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(images, 2) by t-SNE; all in one point where the features are."""
    from sklearn.manifold import TSNE

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), np.float32)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)  # neighbours; there must be more images
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    points: NDArray[np.float32] = tsne.fit_transform(features)
    return points


def describe(findings: Sequence[Finding], material: Material) -> dict[str, Any]:
    """All that is to be said, as plain values; null where a number is not to be had."""
    shards, labelled = material.shards, material.labelled
    first, *others = [_describe_one(finding) for finding in findings]
    return {
        **first,
        "dataset": shards.dataset if shards else None,
        "release": shards.release if shards else None,
        "fingerprint": shards.fingerprint if shards else None,
        "split": labelled.name if labelled else None,
        "images": len(material.faces),
        "feature_images": len(labelled) if labelled else 0,
        "unread": {str(path): fault for path, fault in material.faults.items()},
        "against": others[0] if others else None,
    }


def _describe_one(finding: Finding) -> dict[str, Any]:
    trained = finding.trained
    panels = list(finding.empty)
    return {
        "checkpoint": trained.path.name,
        "run": trained.name,
        "step": trained.step,
        "heads": len(trained.network.heads),
        "fcn_loss": trained.config["loss"]["fcn"] if trained.config else None,
        "head_overlap": _known(finding.overlap),
        "overlap_images": len(finding.overlaps),
        "empty_maps": finding.empty,
        "class_separation": _known(finding.separation),
        "faces": [
            {
                "name": face.name,
                "true": face.true,
                "predicted": face.predicted,
                "probability": face.probability,
                "empty": [p for p, own in zip(panels, face.maps, strict=True) if not own.any()],
            }
            for face in finding.faces
        ],
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _where(report: dict[str, Any]) -> str:
    if report["dataset"] is None:
        return f"{report['images']}-images"
    return f"{report['dataset']}-{report['split']}"


def write(
    output: Path, report: dict[str, Any], findings: Sequence[Finding], material: Material
) -> None:
    """The figures, and the JSON file beside them once they are there."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (ATTENTION, OTHER_ATTENTION, FEATURES, REPORT):  # of a former look
        (output / name).unlink(missing_ok=True)
    split = f"{report['dataset']}, split '{report['split']}'"
    where = "given images" if material.true[0] is None else split
    for name, finding in zip((ATTENTION, OTHER_ATTENTION), findings, strict=False):
        panels = panel_names(len(finding.trained.network.heads))
        save(attention_figure(finding.faces, panels, _title(finding, where)), output / name)
    if material.labelled is not None:
        panes = []
        for finding in findings:
            assert finding.features is not None
            log.info("%s: t-SNE", finding.trained.path)
            panes.append((_heading(finding), project(finding.features)))
        title = f"Pooled features of {len(material.labelled)} images by t-SNE: {split}"
        labels, names = material.labelled.index["label"], material.labelled.class_names
        save(features_figure(panes, labels, names, title), output / FEATURES)
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")


def _title(finding: Finding, where: str) -> str:
    """Of the figure of maps: the network and the images, how fine maps are, how heads overlap."""
    places = finding.trained.image_size // STRIDE
    title = f"Where {finding.label} looks: {where}; maps of {places} × {places} places"
    if len(finding.overlaps):
        title += (
            f"\noverlap of heads {finding.overlap:.2f} over {len(finding.overlaps)} images "
            "(1: all look at the same places, 0: no two at the same)"
        )
    return title


def _heading(finding: Finding) -> str:
    """A network's name, how its features were trained where that is known, how classes lie."""
    parts = [finding.label]
    if finding.trained.config:
        fcn = finding.trained.config["loss"]["fcn"]
        parts.append("no FCN loss" if fcn == "none" else f"{fcn} loss")
    apart = "–" if math.isnan(finding.separation) else f"{finding.separation:.2f}"
    return f"{', '.join(parts)}\ndistance between classes : within classes = {apart}"


def track(output: Path, report: dict[str, Any], trained: Trained, experiment: str | None) -> None:
    """A run of its own in MLflow, which names the training's."""
    values = {}
    for ending, found in (("", report), ("_against", report["against"])):
        for key in ("head_overlap", "class_separation"):
            if found is not None and found[key] is not None:
                values[f"explain/{key}{ending}"] = found[key]
    keys = ("checkpoint", "dataset", "release", "split")
    params = {key: report[key] for key in keys if report[key] is not None}
    if report["against"]:
        params |= {f"against_{key}": report["against"][key] for key in ("run", "checkpoint")}
    pictures = (ATTENTION, OTHER_ATTENTION, FEATURES)
    record = RunRecord(
        experiment=experiment or trained.experiment,
        name=f"explain {trained.name} on {_where(report)}",
        params=params,
        tags={"kind": "explanation", "trained_by": trained.run_id or "unknown",
              "fingerprint": report["fingerprint"] or "unknown"},
        config=trained.config,
    )  # fmt: skip
    artifacts = (REPORT, *(name for name in pictures if (output / name).is_file()))
    record_run(output, record, metrics=values, step=report["step"], artifacts=artifacts)


def tell(report: dict[str, Any], output: Path) -> None:
    """The numbers, a few lines a network."""
    for found in filter(None, (report, report["against"])):
        name = f"{found['run']}, {found['checkpoint']}"
        if found["head_overlap"] is not None:
            log.info(
                "%s: overlap of heads %.3f over %d images (1 the same places, 0 none in common)",
                name, found["head_overlap"], found["overlap_images"],
            )  # fmt: skip
        if found["class_separation"] is not None:
            log.info(
                "%s: distance between classes : within classes %.3f over %d images",
                name, found["class_separation"], report["feature_images"],
            )  # fmt: skip
        if any(found["empty_maps"].values()):
            counts = ", ".join(f"{n} of {panel}" for panel, n in found["empty_maps"].items() if n)
            log.info("%s: maps that are the same everywhere, and so empty: %s", name, counts)
    log.info("figures and %s: %s", REPORT, output)
