"""Batches for one rank: bytes from shards by the sampler's order, decoded and augmented by DALI.

Reader threads fetch the next steps' images; DALI decodes, warps, erases and normalises them, on the
GPU where there is one. A stream never ends: its iteration number is the global step, so there is
nothing to reset between epochs and nothing to fast-forward on resume.
"""

import io
import logging
import os
import resource
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor

from dan_dist.augment import UNIFORMS, Augment, place
from dan_dist.model import MEAN, STD
from dan_dist.sampler import (
    Ids,
    augmentation_uniforms,
    epoch_order,
    evaluation_order,
    group_samples,
    rank_columns,
    steps_per_epoch,
)
from dan_dist.shardset import Split

READERS = 4  # threads; they wait for storage, not for a core
STEPS_AHEAD = 4  # steps whose bytes are fetched in advance, before DALI's own queue
ADVISED_AHEAD = 12  # steps that the kernel is told of: cold reads are then under way in numbers
CHUNK = 64  # images a reader thread fetches at a time: fewer, and threads wait for each other
EVALUATION_BATCH = 64  # images a rank evaluates at once

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One rank's columns of a global batch."""

    images: Tensor  # (n, 3, S, S) float32, normalised, channels_last
    labels: Tensor  # (n,) int64; −1 where an evaluation step is padded
    ids: Tensor  # (n,) int64 on the CPU: sample numbers in the split's index


class TooMuchDamageError(OSError):
    """More damaged images than the configuration tolerates."""


class Request(NamedTuple):
    """What a rank needs for one step."""

    ids: Ids  # (n,); −1 for padding
    uniforms: NDArray[np.float32] | None  # (n, UNIFORMS) for augmentation, None for evaluation


class TrainOrder:
    """The requests of a training run, step by step; the next epoch is ordered in the background."""

    def __init__(
        self, split: Split, columns: slice, *, global_batch: int, seed: int, balanced: bool
    ) -> None:
        self.groups = group_samples(split.index["label"], balanced=balanced)
        self.columns, self.global_batch, self.seed = columns, global_batch, seed
        self.steps = steps_per_epoch(len(split), global_batch)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._epochs: dict[int, Future[Ids]] = {}

    def __call__(self, step: int) -> Request:
        epoch, row = divmod(step, self.steps)
        self._epochs.pop(epoch - 1, None)  # before there is another, for memory's sake
        for e in (epoch, epoch + 1):
            if e not in self._epochs:
                self._epochs[e] = self._pool.submit(self._order, e)
        uniforms = augmentation_uniforms(self.seed, step, self.global_batch, UNIFORMS)
        return Request(self._epochs[epoch].result()[row], uniforms[self.columns])

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _order(self, epoch: int) -> Ids:
        order = epoch_order(
            self.groups, global_batch=self.global_batch, seed=self.seed, epoch=epoch
        )
        return np.ascontiguousarray(order[:, self.columns])


class EvaluationOrder:
    """Every sample of a split once, padded with −1 to whole steps; then again, without end."""

    def __init__(self, split: Split, columns: slice, *, global_batch: int) -> None:
        order = evaluation_order(len(split), global_batch)
        self.steps, self.own = len(order), order[:, columns]

    def __call__(self, step: int) -> Request:
        return Request(self.own[step % self.steps], None)

    def close(self) -> None: ...


def readable_key(split: Split, sample: int) -> str:
    """`<shard>/<key>` of a sample, or `<shard>/#<sample>` where the shard does not tell."""
    with suppress(OSError):
        key = split.key(sample)
        if not key.endswith("/") and key.isprintable():
            return key
    return f"{split.shards[split.index[sample]['shard']].name}/#{sample}"


class Reader:
    """Image bytes by sample number, checked; a damaged image is replaced by one of its class.

    The substitute is the next intact sample of the same class in index order, whatever the world
    size. Each damaged image is named once in the log; more than `max_bad` raise TooMuchDamageError.

    tally: how many images all ranks have found damaged, the given one now among them.
    """

    def __init__(
        self, split: Split, max_bad: int, tally: Callable[[int], int] | None = None
    ) -> None:
        self.split, self.max_bad, self._tally = split, max_bad, tally
        self.bad: dict[int, str] = {}  # sample → reason
        self._lock = threading.Lock()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a descriptor per shard
        self._files = [os.open(split.path(k), os.O_RDONLY) for k in range(len(split.shards))]

    def read_all(self, samples: list[int]) -> list[NDArray[np.uint8]]:
        """The JPEG bytes of each sample, or of its substitute; see `read`."""
        images = []
        for sample, row in zip(samples, self._rows(samples), strict=True):
            data, fault = self._fetch(*row)
            is_intact = not fault and sample not in self.bad
            images.append(np.frombuffer(data, np.uint8) if is_intact else self.read(sample))
        return images

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The JPEG bytes of `sample`, or of its substitute.

        Raises:
            TooMuchDamageError: more than `max_bad` images are damaged, or a whole class is.
        """
        for candidate in self._candidates(sample):
            if candidate in self.bad:
                continue
            (row,) = self._rows([candidate])
            data, fault = self._fetch(*row)
            if not fault:
                return np.frombuffer(data, np.uint8)
            self.report(candidate, fault)
        raise TooMuchDamageError(
            f"no intact image is left of the class of {readable_key(self.split, sample)}"
        )

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
            count = self._tally(sample) if self._tally else len(self.bad)
        if count > self.max_bad:
            raise TooMuchDamageError(
                f"{self.split.root / name}: {fault}; {count} images of split "
                f"'{self.split.name}' are damaged, at most {self.max_bad} are tolerated"
            )
        log.warning("damaged image %s (%s): replaced by another of its class", name, fault)

    def close(self) -> None:
        for file in self._files:
            os.close(file)

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
        labels = self.split.index["label"]
        same = np.flatnonzero(labels == labels[sample])
        yield from np.roll(same, -int(np.searchsorted(same, sample, side="right"))).tolist()


class Stream:
    """Endless batches of one rank from global step `start` on.

    `wait_s` adds up the time that `next` spent waiting; `replaced` is the number of images of the
    last batch that stand in for damaged ones. In evaluation (`augment` None) pixels are
    decoded, resized where the shards' size differs, and normalised, nothing else.
    """

    def __init__(
        self,
        reader: Reader,
        order: TrainOrder | EvaluationOrder,
        *,
        image_size: int,
        shard_image_size: int | None,
        augment: Augment | None,
        device: torch.device,
        threads: int,
        start: int = 0,
    ) -> None:
        self.reader, self.order, self.augment = reader, order, augment
        self.image_size, self.resize = image_size, shard_image_size != image_size
        self.device, self.threads = device, threads
        self.step, self.wait_s, self.replaced = start, 0.0, 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._build()

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            images, numbers = self._pipeline.run()
        except RuntimeError as error:
            self._set_aside_undecodable(error)
            return next(self)
        pixels = torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        both = torch.utils.dlpack.from_dlpack(numbers.as_tensor())
        labels = both[:, 0].to(self.device, non_blocking=True)
        self.replaced = self._replaced.pop(self.step)
        self.step += 1
        self.wait_s += time.perf_counter() - began
        return Batch(pixels, labels, both[:, 1])

    def close(self) -> None:
        """Frees DALI's buffers, ends the reader threads, closes the shards."""
        del self._pipeline
        self._pool.shutdown(cancel_futures=True)
        self.order.close()
        self.reader.close()

    def _build(self) -> None:
        """A pipeline whose iteration 0 is global step `self.step`."""
        self._first = self.step
        self._requests: dict[int, Request] = {}
        self._replaced: dict[int, int] = {}
        self._fetched: dict[int, list[Future[list[NDArray[np.uint8]]]]] = {}
        self._pipeline = self.pipeline(self.feed)

    def pipeline(self, feed: Callable[[int], tuple[object, ...]]) -> Any:
        """This stream's graph on its device, built, fed by iteration."""
        on_gpu = self.device.type == "cuda"
        pipeline = _graph(
            feed,
            self.image_size,
            self.resize,
            self.augment is not None,
            "mixed" if on_gpu else "cpu",
            batch_size=len(self.order(self.step).ids),
            # One more than cores: else one idles while another ends an operation's last image
            num_threads=self.threads + 1,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,  # its outputs own their memory: a held batch is never overwritten
        )
        pipeline.build()
        return pipeline

    def feed(self, iteration: int) -> tuple[object, ...]:
        """DALI's batch callback: the inputs of global step `first + iteration`."""
        step = self._first + iteration
        for ahead in range(step, step + ADVISED_AHEAD + 1):
            if ahead not in self._requests:
                self._requests[ahead] = self.order(ahead)
                self._pool.submit(self.reader.advise, self._ids(ahead))
        for ahead in range(step, step + STEPS_AHEAD + 1):
            if ahead not in self._fetched:
                ids = self._ids(ahead)
                chunks = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
                self._fetched[ahead] = [self._pool.submit(self.reader.read_all, c) for c in chunks]
        request, futures = self._requests.pop(step), self._fetched.pop(step)
        labels = self.reader.split.index["label"][np.maximum(request.ids, 0)].astype(np.int64)
        labels[request.ids < 0] = -1
        numbers = np.stack([labels, request.ids], axis=1)
        images = [image for future in futures for image in future.result()]
        self._replaced[step] = sum(i in self.reader.bad for i in request.ids.tolist())
        if self.augment is None or request.uniforms is None:
            return images, numbers
        return images, numbers, *place(request.uniforms, self.augment, self.image_size)

    def _ids(self, step: int) -> list[int]:
        ids: list[int] = np.maximum(self._requests[step].ids, 0).tolist()
        return ids

    def _set_aside_undecodable(self, error: RuntimeError) -> None:
        """After a decoding error, which names no file: finds the images, starts again without them.

        Raises:
            RuntimeError: the error itself, where every image of the step decodes.
        """
        found = []
        for sample in np.maximum(self.order(self.step).ids, 0).tolist():
            try:
                Image.open(io.BytesIO(self.reader.read(sample).tobytes())).load()
            except (OSError, SyntaxError, ValueError) as reason:  # what Pillow raises for bad data
                found.append((sample, str(reason)))
        if not found:
            raise error
        for sample, fault in found:
            self.reader.report(sample, f"cannot be decoded: {fault}")
        del self._pipeline
        self._build()


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _graph(
    feed: Callable[[int], tuple[object, ...]], size: int, resize: bool, augment: bool, decode: str
) -> tuple[Any, ...]:
    outputs = 7 if augment else 2
    kinds = [types.UINT8, types.INT64, types.BOOL, types.INT32, *[types.FLOAT] * 3]
    jpegs, numbers, *placement = fn.external_source(
        source=feed,
        num_outputs=outputs,
        batch=True,
        no_copy=True,
        dtype=kinds[:outputs],
        ndim=[1, 1, 0, 0, 2, 1, 1][:outputs],
    )
    # fancy upsampling makes the GPU's chroma equal the CPU's
    images = fn.decoders.image(
        jpegs, device=decode, output_type=types.RGB, adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )  # fmt: skip
    if resize:
        images = fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR)
    if augment:
        warped, flip, matrix, anchor, shape = placement
        if warped:  # decided for each image
            # By nearest neighbour, as torchvision's RandomAffine; linear costs eight times more
            images = fn.warp_affine(
                images, matrix=matrix, size=(size, size), fill_value=0, inverse_map=True,
                interp_type=types.INTERP_NN,
            )  # fmt: skip
        else:
            images = fn.flip(images, horizontal=flip)
        # On bytes, before the floats: erased pixels are at most 0.009 off the exact 0
        images = fn.erase(
            images, anchor=anchor, shape=shape, axis_names="HW",
            fill_value=[255 * m for m in MEAN],
        )  # fmt: skip
    images = fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="HWC",
        mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
    )  # fmt: skip
    return images, numbers


def train_stream(
    split: Split,
    *,
    rank: int,
    world_size: int,
    global_batch: int,
    seed: int,
    balanced: bool,
    augment: Augment,
    max_bad: int,
    tally: Callable[[int], int] | None = None,
    start: int,
    image_size: int,
    shard_image_size: int | None,
    device: torch.device,
    threads: int,
) -> Stream:
    """The training stream of one rank from global step `start` on."""
    columns = rank_columns(global_batch, rank, world_size)
    order = TrainOrder(split, columns, global_batch=global_batch, seed=seed, balanced=balanced)
    return Stream(
        Reader(split, max_bad, tally),
        order,
        image_size=image_size,
        shard_image_size=shard_image_size,
        augment=augment,
        device=device,
        threads=threads,
        start=start,
    )


def evaluation_stream(
    split: Split,
    *,
    rank: int,
    world_size: int,
    image_size: int,
    shard_image_size: int | None,
    device: torch.device,
    threads: int,
) -> tuple[Stream, int]:
    """One rank's share of evaluation passes, and the steps of a pass. No damage is tolerated.

    An image always stands at the same place of the same batch, whatever the number of ranks:
    kernels sum otherwise for other shapes, and an evaluation is to be the same to the bit.
    """
    batch = min(EVALUATION_BATCH, len(split))
    columns = rank_columns(batch * world_size, rank, world_size)
    order = EvaluationOrder(split, columns, global_batch=batch * world_size)
    stream = Stream(
        Reader(split, max_bad=0),
        order,
        image_size=image_size,
        shard_image_size=shard_image_size,
        augment=None,
        device=device,
        threads=threads,
    )
    return stream, order.steps
