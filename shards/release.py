"""What a data set is to the packer: a list of images, a way to read one, and what was left out."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

NAMES_KEPT = 100  # left-out images named in the manifest

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """One listed image of a release."""

    key: str  # unique within its split; shardset.check_key says what it may be
    label: int
    source: Any  # what `read` needs, small and picklable: a file, or a tuple that begins with it


class Content(NamedTuple):
    """What `read` makes of an item."""

    image: bytes | Image.Image
    meta: Mapping[str, Any] | None = None  # goes into the sample's JSON


@dataclass
class LeftOut:
    """Images that a release lists but that are not packed, by rule: counted, the odd ones named."""

    root: Path  # names are kept relative to it: a manifest does not tell where the source lay
    counts: Counter[str] = field(default_factory=Counter)  # reason → images
    names: list[str] = field(default_factory=list)

    def add(self, reason: str, name: str | Path | None = None, *, images: int = 1) -> None:
        self.counts[reason] += images
        if name is not None:
            log.warning("left out %s: %s", name, reason)
            if len(self.names) < NAMES_KEPT:
                self.names.append(f"{str(name).removeprefix(f'{self.root}/')}: {reason}")


Read = Callable[[Item], Content]


@dataclass(frozen=True)
class Release:
    """A data set as downloaded: what it holds and how one image is read."""

    dataset: str
    release: str
    class_names: tuple[str, ...]  # in label order
    splits: Mapping[str, Sequence[Item]]
    read: Read  # a module-level function or a partial of one; an image of a ValueError is dropped
    left_out: LeftOut = field(default_factory=lambda: LeftOut(Path()))
    mixed: bool = False  # labels mixed in every shard, for sets of many classes
