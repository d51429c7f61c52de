"""Batches of one rank: bytes from shards by the sampler's order, decoded and augmented by DALI.

Reader threads fetch the next steps' images; DALI decodes, warps, erases and normalises them, on the
GPU where there is one; a thread makes the next batch while the last one is computed with. A loader
never ends: its iteration number is the global step, so there is nothing to reset between epochs and
nothing to fast-forward on resume.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data.augment import Augment, placements
from dan_dist.data.graph import Feed, batch_graph
from dan_dist.data.order import EvaluationOrder, Request, TrainOrder
from dan_dist.data.reader import READERS, Reader, decoding_fault
from dan_dist.data.sampler import rank_columns
from shards.format import Split
from shards.index import soft_of

STEPS_AHEAD = 4  # steps whose bytes are fetched in advance, before DALI's own queue
ADVISED_AHEAD = 12  # steps that the kernel is advised of: many cold reads are then under way
EVALUATION_BATCH = 64  # images a rank evaluates at once


class Batch(NamedTuple):
    """One rank's columns of a global batch."""

    images: Tensor  # (n, 3, S, S) float32, normalised, channels_last
    # (n,) int64, −1 where an evaluation step is padded; or of soft labels (n, 1 + classes) float32,
    # the class and then the share of each class
    labels: Tensor
    ids: Tensor  # (n,) int64 on the CPU: sample numbers in the split's index


class Made(NamedTuple):
    """A batch before its labels are on the device."""

    images: Tensor
    labels: Tensor  # as the batch's
    ids: Tensor
    replaced: int  # images that stand in for damaged ones


class Loader:
    """Endless batches of one rank from global step `start` on.

    In evaluation (`augment` None) pixels are decoded, resized where the shards' size differs, and
    normalised, nothing else. soft: labels come with the shares of classes that the index has.

    Attributes:
        wait_s: seconds that `next` has spent waiting, in all.
        replaced: images of the last batch that stand in for damaged ones.
    """

    def __init__(
        self,
        reader: Reader,
        order: TrainOrder | EvaluationOrder,
        *,
        image_size: int,
        augment: Augment | None,
        device: torch.device,
        threads: int,
        start: int = 0,
        soft: bool = False,
    ) -> None:
        self.reader, self.order, self.augment = reader, order, augment
        self.image_size, self.resize = image_size, reader.split.image_size != image_size
        self.device, self.threads, self.soft = device, threads, soft
        self.step, self.wait_s, self.replaced = start, 0.0, 0
        self._making = start  # the batch that is made next; of step n, counted from 1, it is n - 1
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._maker = ThreadPoolExecutor(1, "batches", initializer=self._enter_thread)
        self._next: Future[Made] | None = None
        self._pipeline: Any = None
        self._build()

    def __next__(self) -> Batch:
        began = time.perf_counter()
        made = (self._next or self._maker.submit(self._make)).result()
        self._next = self._maker.submit(self._make)
        labels = made.labels.to(self.device, non_blocking=True)
        self.step, self.replaced = self.step + 1, made.replaced
        self.wait_s += time.perf_counter() - began
        return Batch(made.images, labels, made.ids)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees DALI's buffers, ends the threads, closes the shards."""
        self._maker.shutdown(cancel_futures=True)
        self._next = None
        self._pipeline = None
        self._pool.shutdown(cancel_futures=True)
        self.order.close()
        self.reader.close()

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":  # else a thread's is the first GPU
            torch.cuda.set_device(self.device)

    def _make(self) -> Made:
        while True:
            try:
                images, numbers = self._pipeline.run()
                break
            except RuntimeError as error:
                self._set_aside_undecodable(error)
        pixels = torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        replaced, shares = self._replaced.pop(self._making), self._shares.pop(self._making, None)
        self._making += 1
        columns = torch.utils.dlpack.from_dlpack(numbers.as_tensor())
        labels, ids = columns[:, 0], columns[:, 1]
        if shares is not None:
            labels = torch.cat([labels[:, None].float(), torch.from_numpy(shares)], dim=1)
            labels = labels.pin_memory() if self.device.type == "cuda" else labels
        return Made(pixels, labels, ids, replaced)

    def _build(self) -> None:
        """A pipeline whose iteration 0 is the step that is made next."""
        self._first = self._making
        self._requests: dict[int, Request] = {}
        self._replaced: dict[int, int] = {}
        self._shares: dict[int, NDArray[np.float32]] = {}
        self._fetched: dict[int, Callable[[], object]] = {}
        self._pipeline = self.pipeline(self.feed)

    def pipeline(self, feed: Feed) -> Any:
        """This loader's graph on its device, built, fed by iteration."""
        on_gpu = self.device.type == "cuda"
        pipeline = batch_graph(
            feed,
            self.image_size,
            self.resize,
            self.augment is not None,
            self.reader.source(self.device),
            batch_size=len(self.order(self._making).ids),
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
                self._fetched[ahead] = self.reader.fetch(self._ids(ahead), self._pool)
        request, images = self._requests.pop(step), self._fetched.pop(step)()
        labels = self.reader.split.index["label"][np.maximum(request.ids, 0)].astype(np.int64)
        labels[request.ids < 0] = -1
        numbers = np.stack([labels, request.ids], axis=1)
        self._replaced[step] = sum(i in self.reader.bad for i in request.ids.tolist())
        if self.soft:
            self._shares[step] = self._soft_labels(request.ids.tolist())
        if self.augment is None or request.uniforms is None:
            return images, numbers
        return images, numbers, *placements(request.uniforms, self.augment, self.image_size)

    def _soft_labels(self, samples: list[int]) -> NDArray[np.float32]:
        """The shares of classes of each sample, or of the one that stands in for it."""
        used = [self.reader.find(k)[0] if k in self.reader.bad else k for k in samples]
        shares: NDArray[np.float32] = self.reader.split.index["soft"][used]
        return shares

    def _ids(self, step: int) -> list[int]:
        ids: list[int] = np.maximum(self._requests[step].ids, 0).tolist()
        return ids

    def _set_aside_undecodable(self, error: RuntimeError) -> None:
        """After a decoding error, which names no file: finds the images, starts again without them.

        Raises:
            RuntimeError: the error itself, where every image of the step decodes.
        """
        found = {}
        for sample in np.maximum(self.order(self._making).ids, 0).tolist():
            used, content = self.reader.find(sample)  # itself, or its substitute
            if fault := decoding_fault(content.tobytes()):
                found[used] = fault
        if not found:
            raise error
        for sample, fault in found.items():
            self.reader.report(sample, fault)
        self._pipeline = None
        self._build()


def check_soft_labels(split: Split, root: Path) -> None:
    """Refuses, as a ValueError, a split without votes or shares of classes in its index."""
    if soft_of(split.index) is None:
        raise ValueError(
            f"{root}: loss.classification=soft needs votes or soft labels of every image, as "
            "ferplus and AffectNet+ have them; the index has none"
        )


def evaluation_loader(
    split: Split,
    *,
    rank: int,
    world_size: int,
    image_size: int,
    device: torch.device,
    threads: int,
) -> Loader:
    """One rank's share of evaluation passes, of `order.steps` steps each. No damage is tolerated.

    An image always stands at the same place of the same batch, whatever the number of ranks:
    kernels sum otherwise for other shapes, and an evaluation is to be the same to the bit.
    """
    batch = min(EVALUATION_BATCH, len(split))
    columns = rank_columns(batch * world_size, rank, world_size)
    order = EvaluationOrder(split, columns, global_batch=batch * world_size)
    return Loader(
        Reader(split, max_bad=0),
        order,
        image_size=image_size,
        augment=None,
        device=device,
        threads=threads,
    )
