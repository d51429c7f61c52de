"""Image files that a person hands over, packed as a split of shards: read as training's are."""

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dan_dist.data.photographs import FindFaces
from shards import folders
from shards.files import is_address, read_regular
from shards.format import Sample, Split, write_shard
from shards.images import MAX_BYTES, SUFFIXES, decode, holds_one_value, kept_jpeg, to_jpeg
from shards.index import INDEX_DTYPE
from shards.kinds import HEAD_BYTES, begins_as_picture
from shards.pixels import is_flat
from shards.releases.boxes import Box

AHEAD = 64  # images that are prepared before they are written
STDIN = "-"
LIST_SUFFIX = ".txt"
MAX_LIST_BYTES = 1 << 30  # of a list of paths
NO_FACE = "no face found"
NEAR_SQUARE = 0.02  # of the shorter side, by which a crop may be longer

_NO_TEXT = re.compile(rb"[^\t\n\r\x20-\xff]")

log = logging.getLogger(__name__)


class Given(NamedTuple):
    """An image that was given, or a face of it."""

    path: Path
    position: int  # of the image among those that were given, from 0
    fault: str  # why there is no crop; "": there is one
    face: int | None = None  # of a photograph, from 1; None: the crop is the whole image
    box: Box | None = None  # of that face
    changed: tuple[int, int] | None = None  # width and height, where the crop's ratio is another


class PackedImages(NamedTuple):
    """Images as a split, and the faults of those that could not be read."""

    split: Split  # the readable ones, in their order; without classes, all labels are 0
    given: list[Given]  # every image, or every face of all photographs, in their order

    @property
    def paths(self) -> list[Path]:
        """The files of the split's images."""
        return [own.path for own in self.given if not own.fault]

    @property
    def faults(self) -> dict[Path, str]:
        """The files that could not be read, and why."""
        return {own.path: own.fault for own in self.given if own.fault}


class Prepared(NamedTuple):
    """An image, or a face of it, ready to be packed."""

    jpeg: bytes
    fault: str = ""  # why it could not be read
    is_flat: bool = False  # all its pixels have one value
    face: int | None = None
    box: Box | None = None
    changed: tuple[int, int] | None = None


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files that are named, in lists too, and all pictures in the folders that are, by name.

    A list is `-`, the standard input, or a text file: a path a line, from the working folder. What
    systems leave beside pictures is passed over, named or not (`folders.left_by_systems`); the log
    counts it. What a list names and is not there is found when it is read.

    Raises:
        FileNotFoundError: a path that does not exist, or no picture in all that is given.
        ValueError: an address.
    """
    found: list[Path] = []
    passed_over: Counter[str] = Counter()
    empty: list[str] = []
    for path in _named(given, empty):
        if reason := folders.left_by_systems(path):
            passed_over[reason] += 1
        elif not path.is_dir():
            found.append(path)
        elif inside := _below(path):
            found += inside
        else:
            empty.append(f"{path}: no image in it ({', '.join(sorted(SUFFIXES))})")
    if passed_over:
        log.info("passed over of what is named: %s", folders.describe(passed_over))
    if not found:
        if passed_over:
            named = ", ".join(map(str, given))
            empty.append(f"{named}: no image, passed over: {folders.describe(passed_over)}")
        raise FileNotFoundError("; ".join(empty))
    for line in empty:
        log.warning(line)
    return found


def _named(given: Sequence[Path], empty: list[str]) -> Iterator[Path]:
    """What the command line names, and in the place of a list what that names.

    empty: gets a line for each list without a path.
    """
    for path in given:
        is_list = path.suffix.lower() == LIST_SUFFIX and path.is_file()
        if str(path) == STDIN or (is_list and not folders.left_by_systems(path)):
            data = (sys.stdin.buffer.read(MAX_LIST_BYTES) if str(path) == STDIN
                    else read_regular(path, MAX_LIST_BYTES))  # fmt: skip
            lines = [line for line in data.splitlines() if line.strip()]
            if not lines:
                empty.append(f"{path}: no path in it")
            yield from (Path(os.fsdecode(line)) for line in lines)
        elif path.exists() or path.is_symlink():
            if _may_be_list(path):
                log.warning("%s: read as an image; the name of a list of paths ends in %s",
                            path, LIST_SUFFIX)  # fmt: skip
            yield path
        elif is_address(path):
            raise ValueError(f"{path}: an address; download the file first")
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")


def _may_be_list(path: Path) -> bool:
    """Whether a file, which has no picture's ending, begins as text."""
    if path.suffix.lower() in SUFFIXES or not path.is_file():
        return False
    try:
        head = read_regular(path, HEAD_BYTES, cut=True)
    except (OSError, ValueError):
        return False
    return bool(head) and not begins_as_picture(head) and not _NO_TEXT.search(head)


def _below(folder: Path) -> list[Path]:
    """The pictures of a folder and all below it; links to files are followed wherever they lead."""
    passed_over: Counter[str] = Counter()
    root = folder.resolve()

    def entries(inner: Path) -> folders.Entries:
        found = []
        for entry in folders.entries(inner, passed_over):
            leads_out = entry.is_symlink() and folders.is_folder(entry) and not (
                Path(entry.path).resolve().is_relative_to(root)
            )  # fmt: skip
            if leads_out:
                log.warning("left out %s: a link to a folder elsewhere", entry.path)
            else:
                found.append(entry)
        return found

    found = list(folders.walk(folder, entries, passed_over, once=True))
    if passed_over:
        log.info("passed over in %s: %s", folder, folders.describe(passed_over))
    return found


def pack_images(
    paths: Sequence[Path], folder: Path, *, size: int, threads: int,
    progress: Callable[[], object] | None = None, find_faces: FindFaces | None = None,
) -> PackedImages:  # fmt: skip
    """Writes images into a shard in `folder` as the packer would, `size` pixels wide and high.

    Where the aspect ratio of one is changed, its `Given` tells; see `warn_of_changed`.

    progress: called after each image; None shows a bar, of many images. find_faces: the images are
    photographs, of which the faces are packed; one without a face has NO_FACE as its fault.
    """
    given: list[Given] = []

    def samples(done: Callable[[], object]) -> Iterator[Sample]:
        everything = _prepared(paths, size, threads, find_faces)
        for position, (path, images) in enumerate(zip(paths, everything, strict=True)):
            done()
            for image in images:
                given.append(
                    Given(path, position, image.fault, image.face, image.box, image.changed)
                )
                if image.is_flat:
                    log.warning("%s: all its pixels have one value", path)
                if not image.fault:
                    yield Sample(f"{len(given):09d}", image.jpeg, 0)

    with tqdm(
        desc="reading", total=len(paths), disable=bool(progress) or len(paths) <= AHEAD
    ) as bar:
        shard, index = write_shard(folder / "crops.tar", samples(progress or bar.update))
    index = index if shard.samples else np.empty(0, INDEX_DTYPE)
    return PackedImages(Split("crops", folder, (shard,), index, (), size), given)


def warn_of_changed(count: int, path: Path, size: tuple[int, int]) -> None:
    """A line on images that were made square; the path of the first one, and its size."""
    log.warning("%d images are no squares: their aspect ratio was changed to one; the first: "
                "%s, %d×%d pixels", count, path, *size)  # fmt: skip


def _prepared(
    paths: Sequence[Path], size: int, threads: int, find_faces: FindFaces | None
) -> Iterator[list[Prepared]]:
    """Each image, or the faces of each, in order; a bounded number in memory."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), AHEAD):
            own = paths[start : start + AHEAD]
            yield from pool.map(lambda p: _prepare(p, size, find_faces), own)


def _prepare(path: Path, size: int, find_faces: FindFaces | None) -> list[Prepared]:
    try:
        data = read_regular(path, MAX_BYTES)
        if find_faces is not None:
            return _faces(decode(data), size, find_faces)
        if (kept := kept_jpeg(data, size)) is not None:  # its bytes have not been decoded yet
            return [Prepared(kept, is_flat=is_flat(decode(kept)))]
        image = decode(data)
        jpeg, _ = to_jpeg(image, size)
        is_square = max(image.size) <= (1 + NEAR_SQUARE) * min(image.size)
        return [Prepared(jpeg, is_flat=holds_one_value(jpeg),
                         changed=None if is_square else image.size)]  # fmt: skip
    except OSError as error:
        if is_address(path):
            return [Prepared(b"", "an address; download the file first")]
        return [Prepared(b"", error.strerror or str(error))]
    except ValueError as error:
        return [Prepared(b"", str(error))]


def _faces(photograph: Image.Image, size: int, find_faces: FindFaces) -> list[Prepared]:
    faces = []
    for number, face in enumerate(find_faces(photograph), start=1):
        jpeg = b"" if face.image is None else to_jpeg(face.image, size)[0]
        faces.append(Prepared(jpeg, face.fault, face=number, box=face.box))
    return faces or [Prepared(b"", NO_FACE)]
