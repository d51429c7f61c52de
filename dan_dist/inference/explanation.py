"""The explanation of one network: its heads' maps of faces, and how its features lie."""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data.augment import MEAN, STD
from dan_dist.distributed.world import World
from dan_dist.evaluation.predictions import open_loader
from dan_dist.inference.attention import STRIDE, attention_maps
from dan_dist.inference.inputs import Faces, Inputs
from dan_dist.inference.metrics import class_separation, head_overlap
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.classes import columns_of
from dan_dist.model.weights import Trained
from dan_dist.run.plain import refuse_not_finite
from shards.format import Split

log = logging.getLogger(__name__)


class Face(NamedTuple):
    """A face, the network's prediction, and where it looks."""

    name: str  # a file, or <shard>/<key>
    note: str  # about the image, beside it in a figure
    image: NDArray[np.float32]  # (S, S, 3) RGB, 0 to 1
    true: str | None  # None where it is not known
    predicted: str
    probability: float
    maps: NDArray[np.float32]  # (panels, S, S); see `attention_maps`


class Explanation(NamedTuple):
    """The result of a look inside one network."""

    trained: Trained
    faces: list[Face]  # the first ones
    overlaps: NDArray[np.float64]  # of the heads, of each image where two have a map
    empty: dict[str, int]  # panel → its maps that are the same everywhere
    features: NDArray[np.float32] | None  # (labelled images, C)
    separation: float  # of the classes; NaN where it is not defined

    @property
    def panels(self) -> list[str]:
        """The names of a face's maps, in their order."""
        return list(self.empty)

    @property
    def label(self) -> str:
        """The network's name in figures."""
        own = self.trained
        return f"{own.name}/{own.path.name}" if own.config else own.path.name

    @property
    def overlap(self) -> float:
        """The images' mean; NaN without any."""
        return float(self.overlaps.mean()) if len(self.overlaps) else math.nan

    @property
    def fcn_loss(self) -> str | None:
        """The loss that its features were trained with; None where it is not known."""
        return self.trained.config["loss"]["fcn"] if self.trained.config else None

    def title(self, where: str) -> str:
        """Of the figure of maps: network and images, how fine maps are, how heads overlap."""
        places = self.trained.image_size // STRIDE
        title = f"Where {self.label} looks: {where}; maps of {places} × {places} places"
        if len(self.overlaps):
            title += (
                f"\noverlap of heads {self.overlap:.2f} over {len(self.overlaps)} images "
                "(1: all look at the same places, 0: no two at the same)"
            )
        return title

    def heading(self) -> str:
        """Of the pane of features: network and loss, where that is known; how classes lie."""
        parts = [self.label]
        if (fcn := self.fcn_loss) is not None:
            parts.append("no FCN loss" if fcn == "none" else f"{fcn} loss")
        apart = "–" if math.isnan(self.separation) else f"{self.separation:.2f}"
        return f"{', '.join(parts)}\ndistance between classes : within classes = {apart}"

    def describe(self) -> dict[str, Any]:
        """The numbers and names as plain values; None for a number that is not defined."""
        trained = self.trained
        return {
            "checkpoint": trained.path.name,
            "run": trained.name,
            "step": trained.step,
            "heads": len(trained.network.heads),
            "fcn_loss": self.fcn_loss,
            "head_overlap": None if math.isnan(self.overlap) else self.overlap,
            "overlap_images": len(self.overlaps),
            "empty_maps": self.empty,
            "class_separation": None if math.isnan(self.separation) else self.separation,
            "faces": [
                {
                    "name": face.name,
                    "true": face.true,
                    "predicted": face.predicted,
                    "probability": face.probability,
                    "empty": [
                        p for p, own in zip(self.panels, face.maps, strict=True) if not own.any()
                    ],
                }
                for face in self.faces
            ],
        }


def examine(trained: Trained, inputs: Inputs, count: int, world: World) -> Explanation:
    """Maps of all faces, the first `count` of them kept; features and how the classes lie."""
    choose_arithmetic("float32")
    trained.network.to(world.device, torch.float32).to(memory_format=torch.channels_last)
    labelled, features, separation = inputs.labelled, None, math.nan
    names = names_in_shards(trained, labelled)
    faces, overlaps, empty = look(trained, inputs.faces, names, count, world)
    if labelled is not None:
        log.info("%s: features of %d images", trained.path, len(labelled))
        features = pooled(trained, labelled, world)
        separation = class_separation(features, labelled.index["label"])
    return Explanation(trained, faces, overlaps, empty, features, separation)


def look(
    trained: Trained, faces: Faces, class_names: list[str], count: int, world: World
) -> tuple[list[Face], NDArray[np.float64], dict[str, int]]:
    """The first `count` faces with their maps; of all, each one's overlap, and the empty maps."""
    panels = panel_names(len(trained.network.heads))
    found: list[Face] = []
    overlaps: list[float] = []
    empty = np.zeros(len(panels), np.int64)
    log.info("%s: maps of %d faces", trained.path, len(faces.split))
    for images in batches(trained, faces.split, world):
        logits, maps = attention_maps(trained.network, images)
        refuse_not_finite(f"{trained.path}: the output", logits)
        probabilities = logits.softmax(dim=1).cpu().numpy()
        pixels = images.permute(0, 2, 3, 1).cpu() * torch.tensor(STD) + torch.tensor(MEAN)
        for row, image, own in zip(probabilities, pixels.clip(0, 1).numpy(), maps, strict=True):
            if (k := len(overlaps)) < count:
                about = faces.names[k], faces.notes[k], image, faces.true[k]
                predicted = class_names[row.argmax()]
                found.append(Face(*about, predicted, float(row.max()), own))
            overlaps.append(head_overlap(own[:-1]))
            empty += ~own.any(axis=(1, 2))
    known = np.array(overlaps)[~np.isnan(overlaps)]
    return found, known, dict(zip(panels, empty.tolist(), strict=True))


def panel_names(heads: int) -> tuple[str, ...]:
    """The names of the maps of a network of so many heads, in their order."""
    return (*(f"head {k + 1}" for k in range(heads)), "fused" if heads else "backbone")


def names_in_shards(trained: Trained, split: Split | None) -> list[str]:
    """The network's classes in its order, under the names that the split has for them."""
    names = list(trained.class_names)
    if split is not None:
        columns = columns_of(trained.class_names, split.class_names)
        assert columns is not None  # `open_split` has checked it
        for name, column in zip(split.class_names, columns, strict=True):
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
    """(images, C) float32: the pooled backbone features, which the FCN losses cluster."""
    found = [trained.network(x).features.cpu() for x in batches(trained, split, world)]
    features: NDArray[np.float32] = torch.cat(found).numpy()
    return features
