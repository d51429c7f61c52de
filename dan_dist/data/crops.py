"""Image files that a person hands over, packed as a split of shards: read as training's are."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from shards.format import Sample, Split, write_shard
from shards.images import MAX_PIXELS, decode, to_jpeg
from shards.index import INDEX_DTYPE

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2"}
MAX_BYTES = 4 * MAX_PIXELS  # of one file
AHEAD = 64  # images that are prepared before they are written


class PackedImages(NamedTuple):
    """Images as a split, and the faults of those that could not be read."""

    split: Split  # the readable ones, in their order; without classes, all labels are 0
    given: list[tuple[Path, str]]  # every image, in its order, with its fault, or ""

    @property
    def paths(self) -> list[Path]:
        """The files of the split's images."""
        return [path for path, fault in self.given if not fault]

    @property
    def faults(self) -> dict[Path, str]:
        """The files that could not be read, and why."""
        return {path: fault for path, fault in self.given if fault}


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files that are named, and all images in the folders that are, by name.

    A path that does not exist, or a folder without images, is a FileNotFoundError.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            inside = [p for p in files if p.is_file() or p.is_symlink()]  # a broken link is named
            if not inside:
                raise FileNotFoundError(f"{path}: no image in it ({', '.join(sorted(SUFFIXES))})")
            found += sorted(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return found


def pack_images(paths: Sequence[Path], folder: Path, *, size: int, threads: int) -> PackedImages:
    """Writes images into a shard in `folder` as the packer would, `size` pixels wide and high."""
    given: list[tuple[Path, str]] = []

    def samples() -> Iterator[Sample]:
        for path, (jpeg, fault) in zip(paths, _prepared(paths, size, threads), strict=True):
            given.append((path, fault))
            if not fault:
                yield Sample(f"{len(given):09d}", jpeg, 0)

    shard, index = write_shard(folder / "crops.tar", samples())
    index = index if shard.samples else np.empty(0, INDEX_DTYPE)
    return PackedImages(Split("crops", folder, (shard,), index, (), size), given)


def _prepared(paths: Sequence[Path], size: int, threads: int) -> Iterator[tuple[bytes, str]]:
    """Each image's JPEG bytes, or its fault, in order; a bounded number in memory."""
    hidden = len(paths) <= AHEAD
    with ThreadPoolExecutor(threads) as pool, tqdm(paths, "reading", disable=hidden) as bar:
        for start in range(0, len(paths), AHEAD):
            for prepared in pool.map(lambda p: _prepare(p, size), paths[start : start + AHEAD]):
                bar.update()
                yield prepared


def _prepare(path: Path, size: int) -> tuple[bytes, str]:
    try:
        if (length := path.stat().st_size) > MAX_BYTES:
            return b"", f"{length} bytes, at most {MAX_BYTES} are read"
        jpeg, is_original = to_jpeg(path.read_bytes(), size)
        if is_original:
            decode(jpeg)  # bytes that are kept as they are have not been decoded yet
        return jpeg, ""
    except OSError as error:
        return b"", error.strerror or str(error)
    except ValueError as error:
        return b"", str(error)
