"""DALI's graph: encoded or decoded images in, one step's pixels out, on a CPU or a GPU."""

from collections.abc import Callable
from typing import Any, Literal

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from dan_dist.data.augment import MEAN, STD

# The share of a batch that a GPU's hardware JPEG decoder gets, whose pixels differ from those of
# the CUDA decoder. With any share but 0 and 1, pixels depend on an image's place in its rank's
# batch; with 1, on the card, as those without a hardware decoder fall back to the CUDA one.
HW_DECODER_LOAD = 0.0
FILL = tuple(round(255 * m) for m in MEAN)  # of erased boxes: a CPU would cut fractions off

Feed = Callable[[int], tuple[object, ...]]  # iteration → the inputs of every image
# What is fed: JPEG bytes to be decoded on the CPU, or by CPU and GPU; pixels in either's memory
Source = Literal["cpu", "mixed", "pixels", "pixels to gpu", "pixels on gpu"]


def as_batch(tensors: list[TensorCPU]) -> TensorListCPU:
    """One batch of DALI's, without a copy: it would make one of arrays, one by one, in Python."""
    make: Any = TensorListCPU  # whose stub lacks the argument
    batch: TensorListCPU = make(tensors, contiguous=False)
    return batch


def decode(jpegs: Any, device: str, size: int | None) -> Any:
    """(H, W, 3) uint8 RGB of JPEG bytes; size: of the squares that they are resized to, if any."""
    # fancy upsampling makes the GPU's chroma equal the CPU's
    images = fn.decoders.image(
        jpegs, device=device, output_type=types.RGB, adjust_orientation=False,
        jpeg_fancy_upsampling=True, hw_decoder_load=HW_DECODER_LOAD,
    )  # fmt: skip
    if size is None:
        return images
    return fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR)


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def batch_graph(
    feed: Feed, size: int, resize: bool, augment: bool, source: Source
) -> tuple[Any, ...]:
    """Normalised (S, S, 3) float32 images, and the numbers that are fed beside them."""
    outputs = 7 if augment else 2
    is_jpeg = source in ("cpu", "mixed")
    kinds = [types.UINT8, types.INT64, types.BOOL, types.INT32, *[types.FLOAT] * 3]
    dims = [1 if is_jpeg else 3, 1, 0, 0, 2, 1, 1]
    if source != "pixels on gpu":
        images, numbers, *placement = fn.external_source(
            source=feed, num_outputs=outputs, dtype=kinds[:outputs], ndim=dims[:outputs],
            batch=True, no_copy=True,
        )  # fmt: skip
    else:  # of one source, all outputs are on one device
        first, others = _divided(feed)
        images = fn.external_source(  # copied, as torch takes its memory back
            source=first, device="gpu", dtype=kinds[0], ndim=dims[0], batch=True
        )
        numbers, *placement = fn.external_source(
            source=others, num_outputs=outputs - 1, dtype=kinds[1:outputs], ndim=dims[1:outputs],
            batch=True, no_copy=True,
        )  # fmt: skip
    if is_jpeg:
        images = decode(images, source, size if resize else None)
    elif source == "pixels to gpu":
        images = images.gpu()
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


def _divided(feed: Feed) -> tuple[Callable[[int], object], Feed]:
    """The first input of a feed, and its others, which DALI asks for in any order."""
    halves: dict[int, tuple[object, ...]] = {}

    def take(iteration: int) -> tuple[object, ...]:
        """The inputs of an iteration; they are kept until they have been taken twice."""
        if iteration in halves:
            return halves.pop(iteration)
        halves[iteration] = feed(iteration)
        return halves[iteration]

    return lambda iteration: take(iteration)[0], lambda iteration: take(iteration)[1:]
