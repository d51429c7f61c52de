"""A release: a data set as downloaded, as the list of its images and a way to read one.

Each module of shards/releases yields one; shards/packing makes shards of it.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from shards.cut import AS_RELEASED

NAMES_KEPT = 100  # left-out images named in the manifest

# Of expressions, as data sets call them, in small letters
SYNONYMS = {
    "happiness": "happy", "sadness": "sad", "angry": "anger", "surprised": "surprise",
    "fearful": "fear", "disgusted": "disgust",
}  # fmt: skip

log = logging.getLogger(__name__)


def common_name(class_name: str) -> str:
    """The one name of a class that data sets call differently."""
    return SYNONYMS.get(class_name.casefold(), class_name.casefold())


class Item(NamedTuple):
    """One listed image of a release."""

    key: str  # unique within its split; see shards.format.check_key
    label: int
    source: Any  # for `read`, small and picklable: a file, or a tuple that begins with it


class Content(NamedTuple):
    """The image of an item, read."""

    image: bytes | Image.Image
    meta: Mapping[str, Any] | None = None  # goes into the sample's JSON
    # Votes or shares of the classes, in label order; of all images of a release, or of none.
    soft: tuple[float, ...] | None = None


def check_soft(values: Sequence[Any], where: str) -> tuple[float, ...]:
    """Votes or shares of the classes; a ValueError names `where` these are none."""
    try:
        shares = tuple(float(v) for v in values if type(v) in (int, float))
    except OverflowError as error:
        raise ValueError(f"{where}: a number is too large") from error
    if len(shares) != len(values) or not all(math.isfinite(v) and v >= 0 for v in shares):
        raise ValueError(f"{where}: {list(values)}, expected numbers of 0 or more")
    if not sum(shares) > 0:
        raise ValueError(f"{where}: {list(values)} sum to nothing")
    return shares


@dataclass
class LeftOut:
    """Images that a release lists but that are not packed, by rule: counted, the odd ones named."""

    root: Path  # names are kept relative to it: where the source lies changes no byte
    counts: Counter[str] = field(default_factory=Counter)  # reason → images
    names: list[str] = field(default_factory=list)
    # What nobody would take for an image of the release: in no plan and no manifest.
    passed_over: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, name: str | Path | None = None, *, images: int = 1) -> None:
        self.counts[reason] += images
        if name is not None:
            log.warning("left out %s: %s", name, reason)
            if len(self.names) < NAMES_KEPT:
                self.names.append(f"{str(name).removeprefix(f'{self.root}/')}: {reason}")


Read = Callable[[Item], Content]


@dataclass(frozen=True)
class Release:
    """A data set as downloaded: its images and the way to read one."""

    dataset: str
    release: str
    class_names: tuple[str, ...]  # in label order
    splits: Mapping[str, Sequence[Item]]
    # A module-level function or a partial of one. Its ValueError drops the image, others stop the
    # pack: another time the image may be read.
    read: Read
    left_out: LeftOut = field(default_factory=lambda: LeftOut(Path()))
    mixed: bool = False  # labels mixed in every shard, for sets of many classes
    face_cut: str = AS_RELEASED  # how faces are cut out of photographs, see shards.cut
