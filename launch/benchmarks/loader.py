"""The loader beside its ceiling and its peers: images decoded and augmented, on the device.

All decode the same JPEGs and augment them by the same recipe with as many processes or threads as
this rank has cores. The peers' order is simpler: none of theirs is balanced, exact and resumable.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.dlpack
from nvidia.dali import fn, math, pipeline_def, types
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.measure import Measure, Table, consume, in_turn, ratio, show
from dan_dist.build import open_train_loader
from dan_dist.config import Augmentation, Config
from dan_dist.data import graph
from dan_dist.data.augment import ERASE_RATIO, MEAN, STD
from dan_dist.data.loader import Loader
from dan_dist.data.reader import Reader
from dan_dist.distributed.world import World
from shards.format import ShardSet, Split

RECORDED_STEPS = 8  # that the ceiling is fed with, over and over
SHUFFLE = 1000  # images in webdataset's and DALI's buffers
OURS, CEILING, AUTHORS = "dan_dist", "the same graph, fed from memory", "ImageFolder, PIL"
DECODED = "dan_dist, data.decoded=host"


def run(
    config: Config, world: World, shards: ShardSet, folder: Path, *, images: int, repeats: int
) -> dict[str, Table]:
    """Prints and returns the tables of a warm and of a cold page cache.

    config: train.global_batch is this rank's batch. folder: where the authors' way finds its files.
    """
    split = shards.split("train")
    faces = _extract(split, folder / "faces")
    tars = [split.path(number) for number in range(len(split.shards))]
    size, batch, augment = config.model.image_size, config.train.global_batch, config.data.augment
    loader = open_train_loader(config, world, split, start=0)
    changes = {"decoded": "host", "cache": str(folder / "decoded")}
    of_decoded = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    decoded = open_train_loader(of_decoded, world, split, start=0)
    transform = _transform(augment, size)
    move = partial(_moved, device=world.device)
    shared = _by_decoder_load(config, world, split) if world.device.type == "cuda" else {}
    contenders: dict[str, tuple[Iterator[Tensor], list[Path]]] = {
        OURS: ((next(loader).images for _ in count()), tars),
        CEILING: (_from_memory(config, world, shards), []),
        AUTHORS: (move(_authors(faces, transform, batch, world.cores)), [*faces.glob("*/*")]),
        DECODED: ((next(decoded).images for _ in count()), []),
        **{name: ((next(other).images for _ in count()), []) for name, other in shared.items()},
    }
    if find_spec("webdataset"):
        peer = move(_webdataset(tars, transform, batch, world.cores))
        contenders["webdataset, PIL"] = (peer, tars)
    else:
        print("webdataset is not installed: left out")
    dali = _dali_reader(tars, augment, size, batch, world)
    contenders["DALI's readers.webdataset"] = (dali, tars)
    tables = {}
    for state in ("warm", "cold"):
        chosen = {
            name: partial(_measure, batches, files if state == "cold" else [], images, world.device)
            for name, (batches, files) in contenders.items()
            if state == "warm" or files
        }
        table = in_turn(chosen, repeats, f"loader, {state}")
        ratios = {"images/s": AUTHORS, "CPU-ms an image": AUTHORS}
        title = f"Loader, {size} px, batches of {batch}, {state} page cache"
        show(title, table, {"images/s": ".0f", "CPU-ms an image": ".2f"}, ratios)
        if state == "warm":
            print(
                f"share of the ceiling: {100 * ratio(table, OURS, CEILING, 'images/s'):.1f} %; "
                f"decoded once: {ratio(table, DECODED, OURS, 'images/s'):.2f} times as fast"
            )
        tables[state] = table
    for opened in (loader, decoded, *shared.values()):
        opened.close()
    return tables


def _measure(
    batches: Iterator[Tensor], evicted: list[Path], images: int, device: torch.device
) -> Measure:
    """evicted: files that are put out of the page cache first."""
    for path in evicted:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # what is not on the disk yet stays in memory
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return consume(batches, images, device)


def _extract(split: Split, folder: Path) -> Path:
    """The images as files in a folder for each label."""
    reader = Reader(split, max_bad=0)
    for sample, row in enumerate(split.index):
        path = folder / str(row["label"]) / f"{sample:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read(sample).tobytes())
    reader.close()
    return folder


def _moved(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    for images in batches:
        yield images.to(device, non_blocking=True)


def _from_memory(config: Config, world: World, shards: ShardSet) -> Iterator[Tensor]:
    """Our graph without reading, checking and ordering: the inputs of a few steps, over again."""
    loader = open_train_loader(config, world, shards.split("train"), start=0)
    recorded = [loader.feed(step) for step in range(RECORDED_STEPS)]
    pipeline = loader.pipeline(lambda step: recorded[step % RECORDED_STEPS])
    loader.close()
    return _outputs(pipeline)


def _by_decoder_load(config: Config, world: World, split: Split) -> dict[str, Loader]:
    """With a share of each batch, or all of it, for the GPU's hardware decoder.

    With any share but 0 and 1 pixels depend on an image's place in the batch: for figures alone.
    """
    found = {}
    for load in (0.65, 1.0):
        with patch.object(graph, "HW_DECODER_LOAD", load):
            found[f"hw_decoder_load {load}"] = open_train_loader(config, world, split, start=0)
    return found


def _outputs(pipeline: Any) -> Iterator[Tensor]:
    while True:
        images, _ = pipeline.run()
        yield torch.utils.dlpack.from_dlpack(images.as_tensor())


def _transform(augment: Augmentation, size: int) -> Callable[[object], Tensor]:
    """The recipe as the authors' script composes it."""
    affine = transforms.RandomAffine(
        augment.degrees, scale=tuple(augment.scale), translate=(augment.translate,) * 2
    )
    composed: Callable[[object], Tensor] = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.RandomHorizontalFlip(augment.flip_p),
            transforms.RandomApply([affine], augment.affine_p),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(augment.erase_p, tuple(augment.erase_area)),
        ]
    )
    return composed


def _authors(
    folder: Path, transform: Callable[[object], Tensor], batch: int, workers: int
) -> Iterator[Tensor]:
    """Files, PIL, torchvision's transforms, images drawn by weight with replacement."""
    faces = ImageFolder(folder, transform)
    counts = torch.bincount(torch.tensor(faces.targets))
    weights = (1 / counts)[faces.targets]
    sampler = WeightedRandomSampler(weights.tolist(), 100 * len(faces))
    while True:
        for images, _ in DataLoader(faces, batch, sampler=sampler, num_workers=workers):
            yield images


def _webdataset(
    tars: list[Path], transform: Callable[[object], Tensor], batch: int, workers: int
) -> Iterator[Tensor]:
    import webdataset  # which need not be installed

    faces = (
        webdataset.WebDataset([str(path) for path in tars], resampled=True, shardshuffle=False)
        .shuffle(SHUFFLE)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
    )
    for images, _ in webdataset.WebLoader(faces, batch_size=batch, num_workers=workers):
        yield images


def _dali_reader(
    tars: list[Path], augment: Augmentation, size: int, batch: int, world: World
) -> Iterator[Tensor]:
    """DALI's own reader and random numbers."""
    on_gpu = world.device.type == "cuda"
    pipeline = _dali_graph(
        [str(path) for path in tars], augment, size, "mixed" if on_gpu else "cpu",
        batch_size=batch, num_threads=world.cores + 1,
        device_id=world.device.index if on_gpu else None, prefetch_queue_depth=2,
    )  # fmt: skip
    pipeline.build()
    return _outputs(pipeline)


@pipeline_def  # type: ignore[untyped-decorator]
def _dali_graph(
    tars: list[str], augment: Augmentation, size: int, decode: str
) -> tuple[object, object]:
    # Without mmap: mapped pages would stay in memory when the cache is emptied
    jpegs, labels = fn.readers.webdataset(  # type: ignore[misc]
        paths=tars, index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
        ext=["jpg", "cls"], random_shuffle=True, initial_fill=SHUFFLE, dont_use_mmap=True,
        name="reader",
    )  # fmt: skip
    images = fn.decoders.image(jpegs, device=decode, output_type=types.RGB)
    affine = fn.random.coin_flip(probability=augment.affine_p)
    degrees, shift = augment.degrees, augment.translate * size
    rotation = fn.transforms.rotation(
        angle=affine * _uniform(-degrees, degrees), center=[size / 2] * 2
    )
    moved = fn.transforms.translation(rotation, offset=affine * _uniform(-shift, shift, shape=[2]))
    low, high = augment.scale
    matrix = fn.transforms.scale(
        moved, scale=1 - affine * _uniform(1 - high, 1 - low) * types.Constant([1.0, 1.0]),
        center=[size / 2] * 2,
    )  # fmt: skip
    images = fn.warp_affine(
        images, matrix=matrix, size=(size, size), fill_value=0, interp_type=types.INTERP_NN
    )
    erased = fn.random.coin_flip(probability=augment.erase_p)
    area = size * size * _uniform(augment.erase_area[0], augment.erase_area[1])
    aspect = _uniform(*ERASE_RATIO)
    shape = fn.stack(erased * math.sqrt(area * aspect), erased * math.sqrt(area / aspect))
    images = fn.erase(
        images, anchor=_uniform(0.0, size / 2, shape=[2]), shape=shape, axis_names="HW",
        fill_value=[255 * m for m in MEAN],
    )  # fmt: skip
    images = fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="HWC",
        mirror=fn.random.coin_flip(probability=augment.flip_p),
        mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
    )  # fmt: skip
    return images, labels


def _uniform(low: float, high: float, *, shape: list[int] | None = None) -> Any:
    """Random numbers of a range; DALI refuses one that holds a single number."""
    if low < high:
        return fn.random.uniform(range=[low, high], shape=shape or [])
    same: Any = [low] * shape[0] if shape else low
    return types.Constant(same)
