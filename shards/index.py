"""A split's index: a row for each image, by which every rank finds it, checked as it is read."""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.files import read_bounded

INDEX_DTYPE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32", "<u4")]
)
HEADER_BYTES = 4096  # of the file, at most


def read_index(
    path: Path, sizes_bytes: Sequence[int], samples: int, classes: int
) -> tuple[NDArray[Any], str]:
    """A split's index, every row within range, and the sha256 of its file.

    It is read, not mapped: a mapped file that is cut short ends its readers by SIGBUS, and what is
    in memory stays what was checked. sizes_bytes: of the shards.

    Raises:
        FileNotFoundError: it is missing. ValueError: it is no index, or does not fit the shards.
    """
    check_present(path)
    content = read_bounded(path, samples * INDEX_DTYPE.itemsize + HEADER_BYTES)
    try:
        # Not np.load, which opens zip archives too.
        file = BytesIO(content)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is parsed as Python text: errors of many kinds
        raise ValueError(f"{path}: not an index: {error}") from error
    rows = (len(content) - file.tell()) / INDEX_DTYPE.itemsize
    if dtype != INDEX_DTYPE or shape != (samples,) or rows != samples:
        found = f"{rows:g} rows, {shape} of {dtype} by its header"
        raise ValueError(f"{path}: {found}; the manifest lists {samples} samples")
    index = np.frombuffer(content, INDEX_DTYPE, offset=file.tell())
    sha256 = hashlib.sha256(content).hexdigest()
    if not samples:
        return index, sha256
    sizes = np.array(sizes_bytes)
    for field, limit in (("shard", len(sizes)), ("label", classes)):
        low, high = int(index[field].min()), int(index[field].max())
        if low < 0 or high >= limit:
            value = low if low < 0 else high
            raise ValueError(f"{path}: {field} {value}, expected 0 to {limit - 1}")
    size, offset = index["size"], index["offset"]
    last = sizes[index["shard"]] - size  # a difference cannot overflow, offset + size can
    if size.min() < 1 or offset.min() < 0 or (offset > last).any():
        raise ValueError(f"{path}: an image lies outside its shard")
    return index, sha256


def check_present(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found, but the manifest lists it: copy the whole set")
