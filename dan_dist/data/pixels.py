"""Decoded pixels in a file, checked as they are read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.files import check_form, read_json

FAULT_BYTES = 16_384  # of a sample's entry, at most: it names a file


class PixelFile:
    """A split's pixels in a file, which a node's ranks read through the system's page cache.

    It is read, not mapped: a mapped file that is cut short, or whose disk fails, ends its readers
    by SIGBUS.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.path, self.image_size = path, image_size
        self.image_bytes = image_size * image_size * 3
        self._sums = np.frombuffer(sums_of(path).read_bytes(), np.uint64)
        self._file = os.open(path, os.O_RDONLY)

    def read(self, sample: int) -> tuple[NDArray[np.uint8], str]:
        """The (S, S, 3) pixels of a sample, or (0,), and what is wrong with them."""
        fault, data = "are not those that were decoded", b""
        try:
            data = os.pread(self._file, self.image_bytes, sample * self.image_bytes)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        pixels = np.frombuffer(data, np.uint8)
        if len(data) == self.image_bytes and checksums(pixels[None])[0] == self._sums[sample]:
            return pixels.reshape(self.image_size, self.image_size, 3), ""
        way_out = "remove that file, and the next start decodes anew"
        return pixels[:0], f"its pixels in {self.path} {fault}; {way_out}"

    def advise(self, sample: int) -> None:
        """Tells the kernel that a sample is wanted soon."""
        start = sample * self.image_bytes
        os.posix_fadvise(self._file, start, self.image_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._file)


def checksums(pixels: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Of each row of bytes, the sum of its 64-bit words.

    A few µs of CPU for an image of 224 px, of which crc32 takes a tenth of what decoding does.
    """
    whole = pixels.shape[1] // 8 * 8
    words = np.ascontiguousarray(pixels[:, :whole]).view(np.uint64)
    sums: NDArray[np.uint64] = words.sum(axis=1) + pixels[:, whole:].sum(axis=1, dtype=np.uint64)
    return sums


def sums_of(path: Path) -> Path:
    """The file with the checksum of each image's pixels."""
    return path.with_suffix(".sums")


def faults_of(path: Path) -> Path:
    """The file with what is wrong with images that could not be decoded; it is written last."""
    return path.with_suffix(".json")


def read_faults(path: Path, samples: int) -> dict[int, str]:
    """Which of the samples could not be decoded, and why.

    Raises:
        FileNotFoundError: nothing tells. ValueError: it is not what was written.
    """

    def check(found: Mapping[str, Any]) -> None:
        check_form(found, dict.fromkeys(found, str))
        for sample, fault in found.items():
            if not (sample.isdecimal() and int(sample) < samples and fault):
                raise ValueError(f"{sample}: {fault!r}, expected faults of {samples} samples")

    found = read_json(faults_of(path), (samples + 1) * FAULT_BYTES, {}, check)
    return {int(sample): fault for sample, fault in found.items()}


def is_whole(path: Path, samples: int, size_bytes: int) -> bool:
    """Whether all that belongs to a file of pixels is there, by its sizes and its faults."""
    expected = {path: size_bytes, sums_of(path): 8 * samples}
    if not all(file.is_file() and file.stat().st_size == n for file, n in expected.items()):
        return False
    try:
        read_faults(path, samples)
    except (FileNotFoundError, ValueError):
        return False
    return True
