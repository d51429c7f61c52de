"""Image bytes from shards, checked; a damaged image is replaced by another of its class."""

import io
import logging
import os
import resource
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU
from PIL import Image, UnidentifiedImageError

from dan_dist.data.graph import Source, as_batch
from dan_dist.data.mixture import groups_of, set_of
from shards.format import Split
from shards.images import FORMATS

READERS = 4  # threads; they wait for storage, not for a core
CHUNK = 64  # images a reader thread fetches at a time: fewer, and threads wait for each other

log = logging.getLogger(__name__)


class TooMuchDamageError(OSError):
    """More damaged images of a split than the configuration tolerates."""

    def __init__(self, line: str, split: Split) -> None:
        super().__init__(line)
        self.split = split


def readable_key(split: Split, sample: int) -> str:
    """`<shard>/<key>` of a sample, or `<shard>/#<sample>` where the tar header is not readable."""
    with suppress(OSError):
        key = split.key(sample)
        if not key.endswith("/") and key.isprintable():
            return key
    return f"{split.shards[split.index[sample]['shard']].name}/#{sample}"


def decoding_fault(jpeg: bytes) -> str:
    """Why an image cannot be decoded; empty where it can be."""
    try:
        Image.open(io.BytesIO(jpeg), formats=FORMATS).load()
    except UnidentifiedImageError:
        return "cannot be decoded: not an image of a known format"
    except (OSError, SyntaxError, ValueError) as reason:  # what Pillow raises for bad data
        return f"cannot be decoded: {reason}"
    return ""


def _header_fault(data: bytes) -> str:
    """Why not even an image's header can be read: DALI's decoders, given such a one, may crash."""
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return decoding_fault(data)  # it may be of another format
    return ""


class Reader:
    """Image bytes by sample number, checked; a damaged image is replaced by one of its class.

    The substitute is the next intact sample of the same class in index order, whatever the world
    size. Each damaged image is named once in the log; more than `max_bad` raise TooMuchDamageError.

    Of several sets, each has its own substitutes and its own `max_bad`.

    count_unique: given a damaged sample, the number of different ones that all ranks have found in
    its set.
    """

    layout = ""  # of what `read` gives, in DALI's letters

    def __init__(
        self, split: Split, max_bad: int, count_unique: Callable[[int], int] | None = None
    ) -> None:
        self.split, self.max_bad, self._tally = split, max_bad, count_unique
        self.bad: dict[int, str] = {}  # sample → reason
        self._lock = threading.Lock()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a descriptor per shard
        self._files = [os.open(split.path(k), os.O_RDONLY) for k in range(len(split.shards))]

    def source(self, device: torch.device) -> Source:
        """What `fetch` gives, for a graph on this device."""
        return "mixed" if device.type == "cuda" else "cpu"

    def fetch(self, samples: list[int], pool: Executor) -> Callable[[], object]:
        """Starts to read; what it returns waits for the images, as one batch of DALI's."""
        chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
        futures = [pool.submit(self._tensors, chunk) for chunk in chunks]
        return lambda: as_batch([tensor for future in futures for tensor in future.result()])

    def read_all(self, samples: list[int]) -> list[NDArray[np.uint8]]:
        """The JPEG bytes of each sample, or of its substitute; see `find`."""
        images = []
        for sample, (content, fault) in zip(samples, self.contents(samples), strict=True):
            is_intact = not fault and sample not in self.bad
            images.append(content if is_intact else self.read(sample))
        return images

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The JPEG bytes of `sample`, or of its substitute; see `find`."""
        return self.find(sample)[1]

    def find(self, sample: int) -> tuple[int, NDArray[np.uint8]]:
        """`sample`, or its substitute, and its JPEG bytes.

        Raises:
            TooMuchDamageError: more than `max_bad` images are damaged, or a whole class is.
        """
        for candidate in self._candidates(sample):
            if candidate in self.bad:
                continue
            ((content, fault),) = self.contents([candidate])
            if not fault:
                return candidate, content
            self.report(candidate, fault)
        raise TooMuchDamageError(
            f"{self.split.root}: no intact image is left of the class of "
            f"{readable_key(self.split, sample)}", self.split,
        )  # fmt: skip

    def advise(self, ids: list[int]) -> None:
        """Tells the kernel that these images are wanted soon; it reads them while others go on."""
        for shard, offset, size, _ in self._rows(ids):
            os.posix_fadvise(self._files[shard], offset, size, os.POSIX_FADV_WILLNEED)

    def report(self, sample: int, fault: str) -> None:
        """Notes that `sample` is damaged, so that it is never read again."""
        with self._lock:
            if sample in self.bad:
                return
            self.bad[sample] = fault
            name = readable_key(self.split, sample)
            own = set_of(self.split, sample)
            known = sum(set_of(self.split, bad) == own for bad in self.bad)
            count = self._tally(sample) if self._tally else known
        if count > self.max_bad:
            raise TooMuchDamageError(
                f"{self.split.root / name}: {fault}; {count} images of split "
                f"'{self.split.name}' are damaged, at most {self.max_bad} are tolerated",
                self.split,
            )  # fmt: skip
        log.warning("damaged image %s (%s): replaced by another of its class", name, fault)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def _tensors(self, samples: list[int]) -> list[TensorCPU]:
        return [TensorCPU(content, self.layout) for content in self.read_all(samples)]

    def contents(self, samples: list[int]) -> Iterator[tuple[NDArray[np.uint8], str]]:
        """The bytes of each sample, and what is wrong with them; decoding may yet find more."""
        for row in self._rows(samples):
            data, fault = self._fetch(*row)
            yield np.frombuffer(data, np.uint8), fault or _header_fault(data)

    def _rows(self, samples: list[int]) -> Iterator[tuple[int, int, int, int]]:
        """Shard, offset, size and checksum of each sample: plain numbers, read all at once."""
        rows = self.split.index[samples]
        columns = (rows[name].tolist() for name in ("shard", "offset", "size", "crc32"))
        return zip(*columns, strict=True)

    def _fetch(self, shard: int, offset: int, size: int, crc32: int) -> tuple[bytes, str]:
        try:
            data = os.pread(self._files[shard], size, offset)
        except OSError as error:
            return b"", error.strerror or str(error)
        if len(data) < size:
            return data, f"{len(data)} of {size} bytes are there"
        if zlib.crc32(data) != crc32:
            return data, "its checksum differs from the index"
        return data, ""

    def _candidates(self, sample: int) -> Iterator[int]:
        yield sample
        groups = groups_of(self.split)
        same = np.flatnonzero(groups == groups[sample])
        yield from np.roll(same, -int(np.searchsorted(same, sample, side="right"))).tolist()
