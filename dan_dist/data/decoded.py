"""A split decoded once: its pixels lie on the device, or in the memory of a node.

They are those that the loader's graph decodes; it warps, erases and normalises them by the same
numbers and the same operators. A damaged image is replaced when it is sampled, as by `Reader`.
"""

import json
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import psutil
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU, TensorListGPU
from torch import Tensor
from tqdm import tqdm

from dan_dist.data.graph import Source, as_batch, decode
from dan_dist.data.pixels import PixelFile, checksums, faults_of, is_whole, read_faults, sums_of
from dan_dist.data.reader import READERS, Reader, decoding_fault, readable_key
from shards.command import words
from shards.files import locked, remove_partials, replacing, write_atomically
from shards.format import Split
from shards.limits import left_bytes

BATCH = 256  # images decoded at once
READ_AHEAD = 4  # batches whose bytes are read meanwhile
HEADROOM_BYTES = 8 * 2**30  # of a GPU, for what trains there

log = logging.getLogger(__name__)

Contents = list[tuple[NDArray[np.uint8], str]]  # bytes and fault of each image


class Decoded(NamedTuple):
    """The pixels of a split."""

    # (samples, S, S, 3) uint8 RGB, an array or a GPU's tensor; 0 where there is a fault
    pixels: Any
    faults: dict[int, str]  # sample → why it cannot be read or decoded; its pixels are 0


class DecodedReader(Reader):
    """`Reader` of pixels in the CPU's memory, in place of JPEG bytes."""

    layout = "HWC"

    def __init__(
        self,
        split: Split,
        decoded: Decoded,
        max_bad: int,
        count_unique: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__(split, max_bad, count_unique)
        self._pixels, self._faults = decoded

    def source(self, device: torch.device) -> Source:
        """What `fetch` gives, for a graph on this device."""
        return "pixels to gpu" if device.type == "cuda" else "pixels"

    def advise(self, ids: list[int]) -> None:
        """Has the kernel read the pixels that are wanted soon, where they lie in a file."""
        if isinstance(self._pixels, PixelFile):
            for sample in ids:
                self._pixels.advise(sample)

    def contents(self, samples: list[int]) -> Iterator[tuple[Any, str]]:
        """The pixels of each sample, and what is wrong with it."""
        for sample in samples:
            if fault := self._faults.get(sample, ""):
                yield None, fault
            elif isinstance(self._pixels, PixelFile):
                yield self._pixels.read(sample)
            else:
                yield self._pixels[sample], ""

    def close(self) -> None:
        super().close()
        if isinstance(self._pixels, PixelFile):
            self._pixels.close()


class DeviceReader(DecodedReader):
    """`Reader` of pixels in a GPU's memory."""

    def source(self, device: torch.device) -> Source:
        """What `fetch` gives."""
        return "pixels on gpu"

    def fetch(self, samples: list[int], pool: Executor) -> Callable[[], object]:
        """Gathers the pixels when called, beside the step that the GPU is at."""

        def gather() -> TensorListGPU:
            used = [self.find(s)[0] if s in self._faults else s for s in samples]
            cuda: Any = torch.cuda  # whose streams have no types
            stream = cuda.Stream(self._pixels.device)
            with cuda.stream(stream):
                rows = self._pixels[torch.tensor(used).to(self._pixels.device)]
            stream.synchronize()
            return TensorListGPU(rows, self.layout)

        return gather


def decode_to_memory(
    split: Split, *, image_size: int, device: torch.device, threads: int, copies: int = 1
) -> Decoded:
    """The split in this rank's memory, on its device.

    copies: ranks that share the memory, each with a copy.

    Raises:
        ValueError: it does not fit.
    """
    need = copies * size_bytes(split, image_size)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - HEADROOM_BYTES
        where = f"{torch.cuda.get_device_name(device)}, {HEADROOM_BYTES / 1e9:.1f} GB left to train"
    else:
        free, where = free_memory(), "this machine"
    _announce("device", split, image_size, need, free, where)
    shape = (len(split), image_size, image_size, 3)
    pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    faults, done = dict[int, str](), 0
    for rows in decode_all(split, faults, image_size=image_size, device=device, threads=threads):
        pixels[done : done + len(rows)] = rows
        done += len(rows)
    return Decoded(pixels if device.type == "cuda" else pixels.numpy(), faults)


def decode_to_file(
    split: Split, *, fingerprint: str, cache: str | None, image_size: int, device: torch.device,
    threads: int,
) -> str:  # fmt: skip
    """The file in `cache` with the split's pixels, made if need be.

    One process of a node makes it, others that call this wait for it.

    Raises:
        ValueError: there is no cache, or not enough memory. OSError: the disk is full.
    """
    if cache is None:
        raise ValueError("data.decoded is host: set data.cache to a folder on each node")
    need = size_bytes(split, image_size)
    _announce("host", split, image_size, need, free_memory(), "this machine")
    decoder = f"{'mixed' if device.type == 'cuda' else 'cpu'}-{nvidia.dali.__version__}"
    path = Path(cache) / f"{fingerprint[:16]}-{split.name}-{image_size}-{decoder}.pixels"
    if _is_current(path, split, need):  # looked at before the lock: the folder may be read-only
        return str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(path.with_suffix(".lock"), f"another process decodes into {path}", wait=True)
        with lock:
            return _made(path, split, image_size=image_size, device=device, threads=threads)
    except OSError as error:
        if not is_whole(path, len(split), need):
            raise
        log.warning("%s is used as it is: %s", path, words(error))
        return str(path)


def _made(path: Path, split: Split, *, image_size: int, device: torch.device, threads: int) -> str:
    """The file, decoded anew where it is not whole or leaves out what can be read; under its lock.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    for own in (path, sums_of(path), faults_of(path)):
        remove_partials(own)
    need = size_bytes(split, image_size)
    if _is_current(path, split, need):
        return str(path)
    if (free := shutil.disk_usage(path.parent).free) < need:
        raise OSError(f"data.cache {path.parent}: {need / 1e6:,.1f} MB are needed for the decoded "
                      f"images, {free / 1e6:,.1f} MB are free")  # fmt: skip
    tempfile.TemporaryFile(dir=path.parent).close()  # before the file that is there is touched
    faults, sums = dict[int, str](), list[NDArray[np.uint64]]()
    faults_of(path).unlink(missing_ok=True)  # of pixels that somebody has removed
    with replacing(path) as file:
        for rows in decode_all(
            split, faults, image_size=image_size, device=device, threads=threads
        ):
            pixels = rows.cpu().numpy()
            file.write(pixels.data)
            sums.append(checksums(pixels.reshape(len(pixels), -1)))
    write_atomically(sums_of(path), np.concatenate(sums).tobytes())
    write_atomically(faults_of(path), json.dumps(faults, indent=1) + "\n")
    return str(path)


def open_file(path: str, split: Split, *, image_size: int) -> Decoded:
    """The pixels in a file that `decode_to_file` has made.

    Raises:
        OSError: it is there no more, or not whole.
    """
    file = Path(path)
    if not is_whole(file, len(split), size_bytes(split, image_size)):
        raise OSError(f"{path} is not whole any more; the same command decodes anew")
    return Decoded(PixelFile(file, image_size), read_faults(file, len(split)))


def size_bytes(split: Split, image_size: int) -> int:
    """Of the split's pixels."""
    return len(split) * image_size * image_size * 3


def free_memory() -> int:
    """Bytes that processes of this machine, or of this container, may still take."""
    free, left = int(psutil.virtual_memory().available), left_bytes()
    return free if left is None else min(free, left)


def decode_all(
    split: Split, faults: dict[int, str], *, image_size: int, device: torch.device, threads: int
) -> Iterator[Tensor]:
    """The split's images in order, (≤ BATCH, S, S, 3) uint8 at a time.

    faults: gets the sample and the reason of each that cannot be decoded; it is all 0.
    """
    size = None if split.image_size == image_size else image_size
    chunks = [range(i, min(i + BATCH, len(split))) for i in range(0, len(split), BATCH)]
    reader = Reader(split, max_bad=0)
    bar = tqdm(desc="decoding", total=len(split), unit="image", disable=None)

    def read(chunk: range) -> Contents:
        return list(reader.contents([*chunk]))

    with closing(reader), bar, ThreadPoolExecutor(READERS) as pool:
        decoder = _Decoder(size, device, threads)
        reads = deque[Future[Contents]]()
        for number, chunk in enumerate(chunks):
            for ahead in chunks[number + len(reads) : number + READ_AHEAD]:
                reads.append(pool.submit(read, ahead))
            contents = dict(zip(chunk, reads.popleft().result(), strict=True))
            faults |= {sample: fault for sample, (_, fault) in contents.items() if fault}
            jpegs = {sample: jpeg for sample, (jpeg, fault) in contents.items() if not fault}
            yield _rows(decoder, chunk, jpegs, faults, image_size)
            bar.update(len(chunk))


class _Decoder:
    """Decodes batches, each when it is asked for."""

    def __init__(self, size: int | None, device: torch.device, threads: int) -> None:
        self.device, self._form = device, (size, threads)
        self.build()

    def build(self) -> None:
        """Starts anew; after an error DALI's graph cannot go on."""
        size, threads = self._form
        on_gpu = self.device.type == "cuda"
        self._pipeline = _decoding_graph(
            "mixed" if on_gpu else "cpu",
            size,
            batch_size=BATCH,
            num_threads=threads + 1,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        self._pipeline.build()

    def __call__(self, jpegs: list[NDArray[np.uint8]]) -> Tensor:
        self._pipeline.feed_input("jpegs", as_batch([TensorCPU(jpeg, "") for jpeg in jpegs]))
        (images,) = self._pipeline.run()
        return torch.utils.dlpack.from_dlpack(images.as_tensor())


def _decoded_input(device: str, size: int | None) -> Any:
    return decode(fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1), device, size)


_decoding_graph: Any = pipeline_def(_decoded_input)


def _rows(
    decoder: _Decoder, chunk: range, jpegs: dict[int, NDArray[np.uint8]], faults: dict[int, str],
    size: int,
) -> Tensor:  # fmt: skip
    """The images of a chunk; those that cannot be decoded are added to `faults`."""
    rows = torch.zeros(len(chunk), size, size, 3, dtype=torch.uint8, device=decoder.device)
    while jpegs:
        try:
            images = decoder(list(jpegs.values()))
        except RuntimeError:
            found = {
                s: fault for s, jpeg in jpegs.items() if (fault := decoding_fault(jpeg.tobytes()))
            }
            if not found:
                raise
            faults |= found
            jpegs = {s: jpeg for s, jpeg in jpegs.items() if s not in found}
            decoder.build()
            continue
        rows[torch.tensor([s - chunk.start for s in jpegs]).to(decoder.device)] = images
        break
    return rows


def _announce(place: str, split: Split, size: int, need: int, free: int, where: str) -> None:
    """Logs how much memory is needed.

    Raises:
        ValueError: it is more than is free.
    """
    line = f"{len(split):,} images of {size} px take {need / 1e9:,.2f} GB"
    if need > free:
        raise ValueError(
            f"data.decoded is {place}: {line}, {max(free, 0) / 1e9:,.2f} GB are free ({where})"
        )
    log.info("data.decoded is %s: %s of memory, %s are free", place, line, f"{free / 1e9:,.2f} GB")


def _is_current(path: Path, split: Split, size: int) -> bool:
    """Whether the file is whole and what it leaves out is still damaged.

    Storage that failed for a moment must not cost an image for ever.
    """
    if not is_whole(path, len(split), size):
        return False
    try:
        samples = [*read_faults(path, len(split))]
    except FileNotFoundError:  # another process has begun to decode anew
        return False
    with closing(Reader(split, max_bad=0)) as reader:
        for sample, (content, fault) in zip(samples, reader.contents(samples), strict=True):
            if not fault and not decoding_fault(content.tobytes()):
                name = readable_key(split, sample)
                log.warning("%s leaves out %s, which can be read now: decoding anew", path, name)
                return False
    return True
