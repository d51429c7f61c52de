"""The images with which a look inside is taken: of a split of shards, or files that are given."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dan_dist.data.cache import localise
from dan_dist.data.crops import Given, find_images, pack_images, warn_of_changed
from dan_dist.data.sampler import epoch_order, group_samples
from dan_dist.evaluation.evaluate import CONTEXTS, open_split
from dan_dist.model.weights import Trained
from dan_dist.options import ExplainOptions
from dan_dist.tracking.inputs import dataset_inputs
from shards.format import Split, open_shardset
from shards.releases.source import plain_name

log = logging.getLogger(__name__)

OVERLAP_IMAGES = 256  # of a split, of which maps are made
NAME = 24  # characters of a file's name, in a figure
FEATURE_IMAGES = 2000  # of a split, of which features are drawn


class Faces(NamedTuple):
    """The images of which maps are made."""

    split: Split
    names: list[str]  # a file, or <shard>/<key>
    notes: list[str]  # about an image, beside it in a figure
    true: list[str | None]  # classes; None where they are not known
    faults: dict[Path, str]  # given images that could not be read


class Inputs(NamedTuple):
    """The images with which all networks are looked into."""

    faces: Faces
    labelled: Split | None  # of these, features are drawn
    origin: dict[str, Any]  # of the labelled images: data set, release, fingerprint, split
    datasets: list[dict[str, Any]]  # see `dataset_inputs`

    @property
    def where(self) -> str:
        """The images' origin as a part of names: of folders, of MLflow's runs."""
        if self.labelled is None:
            return f"{len(self.faces.split)}-images"
        return f"{self.origin['dataset']}-{self.origin['split']}"


def open_inputs(
    options: ExplainOptions, networks: Sequence[Trained], folder: Path, threads: int
) -> Inputs:
    """The images that the options name; given ones are packed into `folder`."""
    used: list[dict[str, Any]] = []
    labelled, origin = None, dict.fromkeys(("dataset", "release", "fingerprint", "split"))
    if options.data is not None:
        shards = open_shardset(localise(options.data, options.cache))
        _, split = open_split(shards, options.split, networks[0])
        for other in networks[1:]:
            open_split(shards, split.name, other)
        labelled = evenly(split, FEATURE_IMAGES)
        context = CONTEXTS.get(split.name, "test")
        used = dataset_inputs(shards, {context: labelled}, options.data)
        origin = {
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "split": split.name,
        }
    if options.images:
        size = max(trained.image_size for trained in networks)
        faces = given_faces(options.images, folder, size, threads)
    else:
        assert labelled is not None  # `main` has refused options without images and shards
        faces = first_faces(labelled)
    return Inputs(faces, labelled, origin, used)


def evenly(split: Split, count: int) -> Split:
    """At most `count` images of a split, the classes in turn, none twice; always the same ones.

    No class has more than its share of `count`; those of fewer images have all.
    """
    groups = group_samples(split.index["label"], balanced=True)
    turns = epoch_order(groups, global_batch=min(count, len(split)), seed=0, epoch=0)[0]
    _, first = np.unique(turns, return_index=True)  # in small classes, images come round again
    return replace(split, index=split.index[turns[np.sort(first)]])


def first_faces(labelled: Split) -> Faces:
    """The first of the labelled images."""
    split = replace(labelled, index=labelled.index[:OVERLAP_IMAGES])
    names = [split.key(k) for k in range(len(split))]
    true: list[str | None] = [split.class_names[k] for k in split.index["label"]]
    return Faces(split, names, [""] * len(names), true, {})


def given_faces(given: Sequence[Path], folder: Path, size: int, threads: int) -> Faces:
    """Images from files and folders, packed into `folder`; the log names the unreadable ones."""
    paths = find_images(given)
    packed = pack_images(paths, folder, size=size, threads=threads)
    for path, fault in packed.faults.items():
        log.warning("left out %s: %s", path, fault)
    if not packed.paths:
        raise ValueError(f"none of {len(paths)} images could be read")
    if changed := [(own.path, own.changed) for own in packed.given if own.changed]:
        warn_of_changed(len(changed), *changed[0])
    read = [own for own in packed.given if not own.fault]
    names, notes = [str(own.path) for own in read], [_note(own) for own in read]
    return Faces(packed.split, names, notes, [None] * len(names), packed.faults)


def _note(own: Given) -> str:
    """A given image's file, and whether the network sees it in another shape."""
    name = plain_name(own.path.name)
    name = name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[-NAME // 2 + 1 :]}"
    if own.changed is None:
        return name
    width, height = own.changed
    return f"{name}\n{width}×{height}, made square"
