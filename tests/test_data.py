"""Pixels and labels: the same at every world size, after every resume, and as Pillow reads them."""

import io
import os
import resource
import shutil
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from trees import replace_index

from dan_dist.data import loader as data
from dan_dist.data.augment import ERASE_RATIO, MEAN, STD, UNIFORMS, Augment, placements
from dan_dist.data.loader import ADVISED_AHEAD, Batch, Loader, evaluation_loader
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader
from dan_dist.data.sampler import augmentation_uniforms, rank_columns
from shards.format import ShardSet, Split, open_shardset

CPU = torch.device("cpu")
AUGMENT = Augment(0.5, 0.7, 20, (0.8, 1.0), 0.2, 0.5)


def training(
    split: Split, *, rank: int = 0, world: int = 1, global_batch: int = 12, max_bad: int = 0,
    augment: Augment = AUGMENT, threads: int = 1, start: int = 0,
) -> Loader:  # fmt: skip
    columns = rank_columns(global_batch, rank, world)
    order = TrainOrder(split, columns, global_batch=global_batch, seed=3, balanced=True)
    return Loader(
        Reader(split, max_bad), order, image_size=32, augment=augment, device=CPU,
        threads=threads, start=start,
    )  # fmt: skip


def evaluation(split: Split, *, rank: int = 0, world: int = 1, image_size: int = 32) -> Loader:
    return evaluation_loader(
        split, rank=rank, world_size=world, image_size=image_size, device=CPU, threads=1
    )


def take(loader: Loader, steps: int) -> list[Batch]:
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


@pytest.fixture(scope="module")
def uninterrupted(faces: ShardSet) -> list[Batch]:
    return take(training(faces.split("train")), 15)  # 6 steps an epoch: two borders


@pytest.mark.parametrize("world", [2, 4, 5])
def test_every_world_size_sees_the_same_global_batches(
    faces: ShardSet, uninterrupted: list[Batch], world: int
) -> None:
    split = faces.split("train")
    ranks = [take(training(split, rank=r, world=world), 15) for r in range(world)]
    for step, whole in enumerate(uninterrupted):
        for field in range(3):
            joined = torch.cat([batches[step][field] for batches in ranks])
            assert torch.equal(joined, whole[field]), (step, field)


@pytest.mark.parametrize("start", [1, 6, 10])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_resumed_loader_goes_on_as_if_never_stopped(
    faces: ShardSet, uninterrupted: list[Batch], start: int, threads: int
) -> None:
    resumed = take(training(faces.split("train"), start=start, threads=threads), 15 - start)
    for ours, whole in zip(resumed, uninterrupted[start:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_every_image_once(
    faces: ShardSet, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "EVALUATION_BATCH", 5)
    split = faces.split("val")
    for repeat in range(2):  # two passes: nothing is left over from the first
        ids: list[int] = []
        for rank in range(world):
            loader = evaluation(split, rank=rank, world=world)
            steps = loader.order.steps
            batches = take(loader, steps * (repeat + 1))[steps * repeat :]
            for batch in batches:
                real = batch.labels >= 0
                assert torch.equal(real, batch.ids >= 0)
                # The same images side by side, whatever the number of ranks
                assert len(batch.ids) == 5 and (batch.ids[real] % 5).tolist() == list(
                    range(int(real.sum()))
                )
                ids += batch.ids[real].tolist()
        assert sorted(ids) == list(range(len(split)))


def pillow(split: Split, sample: int) -> Image.Image:
    row = split.index[sample]
    data = split.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_evaluation_pixels_are_pillows_and_normalised(faces: ShardSet) -> None:
    split = faces.split("val")
    (batch,) = take(evaluation(split), 1)
    transform = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
        assert torch.allclose(image, transform(pillow(split, sample)), atol=1e-6)


def test_affine_warp_is_torchvisions(faces: ShardSet) -> None:
    """The same flip, angle, scale and shift through torchvision give the same pixels."""
    split = faces.split("train")
    augment = replace(AUGMENT, erase_p=0.0)
    (batch,) = take(training(split, augment=augment, global_batch=48), 1)
    uniforms = augmentation_uniforms(3, 0, 48, UNIFORMS).astype(np.float64)
    scale = torch.tensor(STD).view(3, 1, 1)
    mean = torch.tensor(MEAN).view(3, 1, 1)
    different = []
    for image, sample, u in zip(batch.images, batch.ids.tolist(), uniforms, strict=True):
        reference = v2.functional.pil_to_tensor(pillow(split, sample))
        if u[0] < 0.5:
            reference = v2.functional.horizontal_flip(reference)
        if u[1] < 0.7:
            shift = np.round((2 * u[4:6] - 1) * 0.2 * 32).astype(int).tolist()
            angle, size = (2 * u[2] - 1) * 20, 0.8 + u[3] * 0.2
            reference = v2.functional.affine(reference, angle, shift, size, [0.0, 0.0])
        ours = ((image * scale + mean) * 255).round()
        different.append((ours != reference).any(dim=0).float().mean().item())
    assert np.mean(different) < 0.005  # rounding at pixel borders only
    assert (uniforms[:, 1] < 0.7).any() and (uniforms[:, 0] < 0.5).any()


def test_erased_boxes_follow_torchvisions_rule() -> None:
    uniforms = np.random.default_rng(0).random((20_000, UNIFORMS)).astype(np.float32)
    placement = placements(uniforms, Augment(erase_p=0.5, erase_area=(0.02, 0.33)), 224)
    height, width = placement.shape.T
    erased = height > 0
    assert erased.mean() == pytest.approx(0.5, abs=0.02)
    area = (height * width / 224**2)[erased]
    # torchvision's RandomErasing: mean area 0.1733 (0.33 is cut where the box does not fit)
    assert area.mean() == pytest.approx(0.174, abs=0.004) and area.min() > 0.019
    ratio = (height / np.maximum(width, 1))[erased]
    assert ratio.min() > ERASE_RATIO[0] * 0.95 and ratio.max() < ERASE_RATIO[1] * 1.05
    corner = placement.anchor + placement.shape
    assert (placement.anchor >= 0).all() and (corner <= 224).all()


def test_no_augmentation_is_the_identity(faces: ShardSet) -> None:
    split = faces.split("train")
    (batch,) = take(training(split, augment=Augment()), 1)
    scale = torch.tensor(STD).view(3, 1, 1)
    for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
        pixels = v2.functional.pil_to_tensor(pillow(split, sample)) / 255
        assert torch.allclose(image * scale + torch.tensor(MEAN).view(3, 1, 1), pixels, atol=1e-6)


def damage(faces: ShardSet, folder: Path, kind: str, samples: list[int]) -> Split:
    """A copy of the shards in which some training images are damaged."""
    shutil.copytree(faces.root, folder)
    split = open_shardset(folder).split("train")
    for sample in samples:
        row = split.index[sample]
        path = split.path(row["shard"])
        data = bytearray(path.read_bytes())
        start, size = int(row["offset"]), int(row["size"])
        if kind == "flipped":
            data[start + size // 2] ^= 0xFF
        else:  # zeros, with a checksum that agrees: only the decoder notices
            data[start : start + size] = bytes(size)
            index = np.load(folder / "index-train.npy")
            index[sample]["crc32"] = zlib.crc32(bytes(size))
            replace_index(folder, index)
        path.write_bytes(data)
    return open_shardset(folder).split("train")


@pytest.mark.parametrize("kind", ["flipped", "undecodable"])
def test_damaged_images_are_replaced_within_their_class(
    faces: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    whole = faces.split("train")
    bad = [0, 25, 26]
    split = damage(faces, tmp_path / "damaged", kind, bad)
    loaders = [training(split, max_bad=5) for _ in range(2)]
    ours, again = (take(loader, 12) for loader in loaders)
    reference = take(training(whole), 12)
    replaced = 0
    for a, b, whole_batch in zip(ours, again, reference, strict=True):
        assert torch.equal(a.images, b.images)  # the substitutes are deterministic
        assert torch.equal(a.labels, whole_batch.labels)
        hit = np.isin(whole_batch.ids.numpy(), bad)
        same = (a.images == whole_batch.images).flatten(1).all(dim=1).numpy()
        assert same[~hit].all()
        replaced += (hit & ~same).sum()
    assert replaced > 0
    assert set(loaders[0].reader.bad) <= set(bad)
    named = {record.args[0] for record in caplog.records}
    assert {whole.key(sample) for sample in loaders[0].reader.bad} <= named


@pytest.mark.parametrize("kind", ["flipped", "undecodable"])
def test_past_the_limit_the_image_is_named(faces: ShardSet, tmp_path: Path, kind: str) -> None:
    split = damage(faces, tmp_path / "damaged", kind, list(range(len(faces.split("train")))))
    loader = training(split, max_bad=2)
    with pytest.raises(OSError, match=r"train-\d\d-\d{5}\.tar/face_\d+.* at most 2 are tolerated"):
        take(loader, 3)


def test_other_sizes_are_resized_in_one_linear_step(faces: ShardSet) -> None:
    (batch,) = take(evaluation(faces.split("val"), image_size=64), 1)
    assert batch.images.shape == (16, 3, 64, 64)
    image = pillow(faces.split("val"), 0).resize((64, 64), Image.Resampling.BILINEAR)
    scale, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    ours = (batch.images[0] * scale + mean) * 255
    assert (ours - v2.functional.pil_to_tensor(image)).abs().mean() < 1


def test_the_kernel_knows_of_reads_well_ahead(
    faces: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, advised, lock = faces.split("train"), [], threading.Lock()

    def note(file: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        with lock:
            advised.append((str(Path(f"/proc/self/fd/{file}").readlink()), offset, size))

    monkeypatch.setattr(os, "posix_fadvise", note)
    loader = training(split)
    next(loader)
    deadline = time.monotonic() + 10
    while len(advised) < 12 * (ADVISED_AHEAD + 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    loader.close()
    order = TrainOrder(split, slice(None), global_batch=12, seed=3, balanced=True)
    for step in range(ADVISED_AHEAD + 1):
        for row in split.index[order(step).ids]:
            own = str(split.path(row["shard"])), row["offset"], row["size"]
            assert own in advised
    order.close()


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_steps(faces: ShardSet) -> None:
    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    with training(faces.split("train"), global_batch=8) as loader:
        for _ in range(1000):
            next(loader)
        before = resident_mib()
        for _ in range(10_000):
            next(loader)
        assert resident_mib() - before < 20
