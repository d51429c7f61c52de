"""A split's index: a row for each image, by which every rank finds it, checked as it is read.

A row ends with the group of images that show one photograph, where the pack has looked for such,
and with the share of each class, where the release has votes or shares beside each label.
"""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.files import read_bounded, read_regular

INDEX_DTYPE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32", "<u4")]
)
HEADER_BYTES = 4096  # of the file, at most
MOST_SOFT = 1000  # classes of which an image has shares: of expressions, not of persons
SOFT_TOLERANCE = 1e-4  # of the sum of an image's shares


def index_dtype(classes: int = 0, *, grouped: bool = False) -> np.dtype[Any]:
    """A row with its group, and with the share of each of some classes, which add up to 1."""
    group = [("group", "<i4")] if grouped else []
    soft = [("soft", "<f4", (classes,))] if classes else []
    return np.dtype([*INDEX_DTYPE.descr, *group, *soft])


def most_bytes(samples: int, classes: int) -> int:
    """The size of an index's file, at most."""
    soft = classes if classes <= MOST_SOFT else 0
    return samples * index_dtype(soft, grouped=True).itemsize + HEADER_BYTES


def with_soft(rows: NDArray[Any], shares: NDArray[Any]) -> NDArray[Any]:
    """The rows with shares of classes, (samples, classes), each made to add up to 1.

    More than MOST_SOFT classes are a ValueError.
    """
    if shares.shape[1] > MOST_SOFT:
        raise ValueError(f"shares of {shares.shape[1]:,} classes, at most {MOST_SOFT:,} are kept")
    grouped = recorded_groups(rows) is not None
    found = _recast(rows, index_dtype(shares.shape[1], grouped=grouped))
    found["soft"] = shares / shares.sum(axis=1, keepdims=True)
    return found


def with_groups(rows: NDArray[Any], groups: NDArray[Any]) -> NDArray[Any]:
    """The rows with the group of each image."""
    soft = soft_of(rows)
    found = _recast(rows, index_dtype(0 if soft is None else soft.shape[1], grouped=True))
    found["group"] = groups
    return found


def plain_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """The rows without groups and shares, in memory."""
    return _recast(rows, INDEX_DTYPE)


def _recast(rows: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A copy with the fields of `dtype`, of which new ones are empty."""
    found = np.empty(len(rows), dtype)
    for name in set(dtype.names or ()) & set(rows.dtype.names or ()):
        found[name] = rows[name]
    return found


def recorded_groups(index: NDArray[Any]) -> NDArray[np.int32] | None:
    """The group of each image, where the rows have it: images of one show one photograph."""
    return index["group"] if "group" in (index.dtype.names or ()) else None


def soft_of(index: NDArray[Any]) -> NDArray[np.float32] | None:
    """The shares of classes, (samples, classes), where the rows have them."""
    return index["soft"] if "soft" in (index.dtype.names or ()) else None


def npy_bytes(array: NDArray[Any]) -> bytes:
    """A NumPy file's content: NumPy itself, on a full disk, names neither file nor reason."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


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
    try:
        # Not np.load, which opens zip archives too.
        file = BytesIO(read_regular(path, HEADER_BYTES, cut=True))
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python text: errors of many kinds
        raise ValueError(f"{path}: not an index: {error}") from error
    start, size_bytes = file.tell(), path.stat().st_size
    soft = {0, classes} if classes <= MOST_SOFT else {0}
    is_known = any(dtype == index_dtype(k, grouped=g) for k in soft for g in (False, True))
    expected = start + samples * dtype.itemsize
    if not is_known or shape != (samples,) or size_bytes != expected:
        rows = (size_bytes - start) / dtype.itemsize if dtype.itemsize else 0
        found = f"{rows:g} rows, {shape} of {dtype} by its header"
        raise ValueError(f"{path}: {found}; the manifest lists {samples} samples")
    content = read_bounded(path, expected)
    index = np.frombuffer(content, dtype, offset=start)
    if samples:
        _check_rows(path, index, np.array(sizes_bytes), classes)
    return index, hashlib.sha256(content).hexdigest()


def _check_rows(path: Path, index: NDArray[Any], sizes: NDArray[Any], classes: int) -> None:
    for field, limit in (("shard", len(sizes)), ("label", classes)):
        low, high = int(index[field].min()), int(index[field].max())
        if low < 0 or high >= limit:
            value = low if low < 0 else high
            raise ValueError(f"{path}: {field} {value}, expected 0 to {limit - 1}")
    size, offset = index["size"], index["offset"]
    last = sizes[index["shard"]] - size  # a difference cannot overflow, offset + size can
    if size.min() < 1 or offset.min() < 0 or (offset > last).any():
        raise ValueError(f"{path}: an image lies outside its shard")
    groups, shares = recorded_groups(index), soft_of(index)
    if groups is not None and groups.min() < 0:
        raise ValueError(f"{path}: group {groups.min()}, expected 0 or more")
    if shares is None:
        return
    is_whole = np.abs(shares.sum(axis=1) - 1) <= SOFT_TOLERANCE  # not a number: is not
    if not is_whole.all() or shares.min() < 0:
        raise ValueError(f"{path}: shares of classes that do not add up to 1")


def check_present(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found, but the manifest lists it: copy the whole set")
