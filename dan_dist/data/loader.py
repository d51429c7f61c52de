"""Batches of one rank: bytes from shards by the sampler's order, decoded and augmented by DALI.

Reader threads fetch the next steps' images; DALI decodes, warps, erases and normalises them, on the
GPU where there is one. A loader never ends: its iteration number is the global step, so there is
nothing to reset between epochs and nothing to fast-forward on resume.
"""

import io
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor

from dan_dist.data.augment import MEAN, STD, Augment, placements
from dan_dist.data.order import EvaluationOrder, Request, TrainOrder
from dan_dist.data.reader import Reader
from dan_dist.data.sampler import rank_columns
from shards.format import Split

READERS = 4  # threads; they wait for storage, not for a core
STEPS_AHEAD = 4  # steps whose bytes are fetched in advance, before DALI's own queue
ADVISED_AHEAD = 12  # steps that the kernel is advised of: many cold reads are then under way
CHUNK = 64  # images a reader thread fetches at a time: fewer, and threads wait for each other
EVALUATION_BATCH = 64  # images a rank evaluates at once

# The share of a batch that a GPU's hardware JPEG decoder gets, whose pixels differ from those of
# the CUDA decoder. With any share but 0 and 1, pixels depend on an image's place in its rank's
# batch; with 1, on the card, as those without a hardware decoder fall back to the CUDA one.
HW_DECODER_LOAD = 0.0
FILL = tuple(round(255 * m) for m in MEAN)  # of erased boxes, a pixel: CPUs cut fractions off


class Batch(NamedTuple):
    """One rank's columns of a global batch."""

    images: Tensor  # (n, 3, S, S) float32, normalised, channels_last
    labels: Tensor  # (n,) int64; −1 where an evaluation step is padded
    ids: Tensor  # (n,) int64 on the CPU: sample numbers in the split's index


class Loader:
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
        augment: Augment | None,
        device: torch.device,
        threads: int,
        start: int = 0,
    ) -> None:
        self.reader, self.order, self.augment = reader, order, augment
        self.image_size, self.resize = image_size, reader.split.image_size != image_size
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

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """This loader's graph on its device, built, fed by iteration."""
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
        return images, numbers, *placements(request.uniforms, self.augment, self.image_size)

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
        jpeg_fancy_upsampling=True, hw_decoder_load=HW_DECODER_LOAD,
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
            images, anchor=anchor, shape=shape, axis_names="HW", fill_value=[*map(float, FILL)]
        )  # fmt: skip
    images = fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="HWC",
        mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
    )  # fmt: skip
    return images, numbers


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
