"""A split decoded once gives the batches of the plain loader, to the bit."""

import logging
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from trees import replace_index

from dan_dist.config import load_config
from dan_dist.data import decoded as module
from dan_dist.data.augment import Augment
from dan_dist.data.decoded import DecodedReader, decode_to_file, decode_to_memory, open_file
from dan_dist.data.loader import Batch, Loader
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader, TooMuchDamageError
from dan_dist.data.sampler import rank_columns
from dan_dist.run.checkpoint import load
from dan_dist.run.folder import step_path
from dan_dist.train import main
from shards.format import ShardSet, Split, open_shardset

CPU = torch.device("cpu")
AUGMENT = Augment(0.5, 0.7, 20, (0.8, 1.0), 0.2, 0.5)
GLOBAL_BATCH, STEPS = 12, 13  # 6 steps an epoch: two epochs, and the next one's first step
BAD = (0, 25, 26)


def to_file(split: Split, cache: Path, size: int = 32) -> str:
    return decode_to_file(
        split, fingerprint="0123456789abcdef0", cache=str(cache), image_size=size, device=CPU,
        threads=1,
    )  # fmt: skip


def reader(split: Split, place: str, cache: Path, *, size: int = 32, max_bad: int = 0) -> Reader:
    if place == "none":
        return Reader(split, max_bad)
    if place == "host":
        return DecodedReader(split, open_file(to_file(split, cache, size), split, image_size=size),
                             max_bad)  # fmt: skip
    found = decode_to_memory(split, image_size=size, device=CPU, threads=1)
    return DecodedReader(split, found, max_bad)


def batches(own: Reader, rank: int, world: int, *, size: int = 32) -> tuple[list[Batch], list[int]]:
    """Two epochs of one rank, and how many images of each batch stand in for damaged ones."""
    columns = rank_columns(GLOBAL_BATCH, rank, world)
    order = TrainOrder(own.split, columns, global_batch=GLOBAL_BATCH, seed=3, balanced=True)
    with Loader(own, order, image_size=size, augment=AUGMENT, device=CPU, threads=1) as loader:
        taken = [(next(loader), loader.replaced) for _ in range(STEPS)]
    return [batch for batch, _ in taken], [replaced for _, replaced in taken]


def assert_equal(ours: list[Batch], plain: list[Batch]) -> None:
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("place", ["host", "device"])
def test_it_is_the_plain_stream(faces: ShardSet, tmp_path: Path, place: str, world: int) -> None:
    split = faces.split("train")
    for rank in range(world):
        plain, _ = batches(Reader(split, 0), rank, world)
        assert_equal(batches(reader(split, place, tmp_path), rank, world)[0], plain)


def test_it_is_the_plain_stream_of_another_size(faces: ShardSet, tmp_path: Path) -> None:
    split = faces.split("train")
    plain, _ = batches(Reader(split, 0), 0, 1, size=64)
    assert_equal(batches(reader(split, "host", tmp_path, size=64), 0, 1, size=64)[0], plain)


def broken(jpeg: bytes, kind: str) -> bytes:
    """As long as before: without a header, or with one and without its quantisation table."""
    if kind == "no header":
        return bytes(len(jpeg))
    table = jpeg.index(b"\xff\xdb")
    end = table + 2 + int.from_bytes(jpeg[table + 2 : table + 4], "big")
    return (jpeg[:table] + jpeg[end:]).ljust(len(jpeg), b"\0")


def damaged(faces: ShardSet, folder: Path, kind: str, samples: Sequence[int] = BAD) -> Split:
    """A copy of the shards in which some images are damaged."""
    shutil.copytree(faces.root, folder)
    split = open_shardset(folder).split("train")
    index = np.load(folder / "index-train.npy")
    for sample in samples:
        row = split.index[sample]
        path, start, size = split.path(row["shard"]), int(row["offset"]), int(row["size"])
        data = bytearray(path.read_bytes())
        if kind == "flipped":
            data[start + size // 2] ^= 0xFF
        else:  # with a checksum that agrees
            data[start : start + size] = broken(bytes(data[start : start + size]), kind)
            index[sample]["crc32"] = zlib.crc32(data[start : start + size])
        path.write_bytes(data)
    replace_index(folder, index)
    return open_shardset(folder).split("train")


@pytest.mark.parametrize("kind", ["flipped", "no header", "no table"])
@pytest.mark.parametrize("place", ["host", "device"])
def test_damage_is_met_and_replaced_alike(
    faces: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, kind: str
) -> None:
    split = damaged(faces, tmp_path / "damaged", kind)
    caplog.clear()
    plain_reader = Reader(split, 3)
    plain, plain_replaced = batches(plain_reader, 0, 1)
    named = [record.args for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    own = reader(split, place, tmp_path, max_bad=3)
    ours, replaced = batches(own, 0, 1)
    assert_equal(ours, plain)
    assert replaced == plain_replaced and sum(replaced) > 0
    assert own.bad == plain_reader.bad
    again = [record.args for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(again) == sorted(named)
    with pytest.raises(TooMuchDamageError, match="at most 0 are tolerated"):
        batches(reader(split, place, tmp_path), 0, 1)


def test_what_killed_processes_left_is_removed(faces: ShardSet, tmp_path: Path) -> None:
    split = faces.split("val")
    path = Path(to_file(split, tmp_path))
    left = [file.with_name(f"{file.name}.0123abcd.partial")
            for file in (path, module.sums_of(path), module.faults_of(path))]  # fmt: skip
    other = path.with_name(f"another-{path.name}.0123abcd.partial")  # under another lock
    for file in (*left, other):
        file.write_bytes(b"x")
    module.faults_of(path).unlink()
    assert to_file(split, tmp_path) == str(path)
    assert list(tmp_path.glob("*.partial")) == [other]


def test_a_substitute_that_cannot_be_decoded_either_is_replaced(
    faces: ShardSet, tmp_path: Path
) -> None:
    """Images of one class that follow each other: one stands in for the other, and is damaged."""
    labels = faces.split("train").index["label"]
    same = np.flatnonzero(labels == labels[25])[:3].tolist()
    split = damaged(faces, tmp_path / "damaged", "no table", same)
    own = Reader(split, 3)
    ours, replaced = batches(own, 0, 1)
    assert sum(replaced) > 0 and set(own.bad) <= set(same)
    assert_equal(batches(reader(split, "host", tmp_path, max_bad=3), 0, 1)[0], ours)


def test_images_without_a_header_do_not_end_the_process(faces: ShardSet, tmp_path: Path) -> None:
    """Of many images at once, DALI's decoder would crash."""
    split = damaged(faces, tmp_path / "damaged", "no header", [*range(3, 80, 7)])
    order = TrainOrder(split, slice(None), global_batch=80, seed=3, balanced=False)
    own = Reader(split, 80)
    with Loader(own, order, image_size=32, augment=AUGMENT, device=CPU, threads=2) as loader:
        replaced = [(next(loader), loader.replaced)[1] for _ in range(3)]
    assert replaced == [11] * 3 and all("cannot be decoded" in fault for fault in own.bad.values())


def test_a_node_decodes_once(faces: ShardSet, tmp_path: Path, monkeypatch) -> None:
    split, calls = faces.split("train"), []
    plain = module.decode_all
    monkeypatch.setattr(module, "decode_all", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: to_file(split, tmp_path), range(3)))
    assert len(set(paths)) == len(calls) == 1
    assert Path(paths[0]).stat().st_size == len(split) * 32 * 32 * 3
    assert "0123456789abcdef-train-32-" in paths[0]
    with monkeypatch.context() as patch:  # what is whole needs no lock, which may be another user's
        patch.setattr(module, "locked", None)
        assert to_file(split, tmp_path) == paths[0]
    Path(paths[0]).with_suffix(".json").unlink()  # what a power cut has left is not trusted
    assert to_file(split, tmp_path) == paths[0] and len(calls) == 2
    assert to_file(split, tmp_path, 64) != paths[0]


def test_storage_that_failed_for_a_moment_costs_no_image_for_ever(
    faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    split, plain = damaged(faces, tmp_path / "damaged", "flipped", [0]), Reader._fetch

    def failing(own: Reader, shard: int, offset: int, size: int, crc32: int) -> tuple[bytes, str]:
        if (shard, offset) == tuple(int(split.index[7][name]) for name in ("shard", "offset")):
            return b"", "Input/output error"
        return plain(own, shard, offset, size, crc32)

    with monkeypatch.context() as storage:
        storage.setattr(Reader, "_fetch", failing)
        path = to_file(split, tmp_path)
        assert set(open_file(path, split, image_size=32).faults) == {0, 7}
        assert to_file(split, tmp_path) == path and "decoding anew" not in caplog.text
    with monkeypatch.context() as disk:  # no room for another: what is there goes on serving
        disk.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        assert to_file(split, tmp_path) == path and "is used as it is: " in caplog.text
    assert set(open_file(path, split, image_size=32).faults) == {0, 7}
    assert to_file(split, tmp_path) == path and "can be read now: decoding anew" in caplog.text
    assert set(open_file(path, split, image_size=32).faults) == {0}
    made_ns = Path(path).stat().st_mtime_ns  # what is damaged for good costs nothing more
    assert to_file(split, tmp_path) == path and Path(path).stat().st_mtime_ns == made_ns


def test_ranks_share_the_memory(faces: ShardSet, tmp_path: Path) -> None:
    """That of the system's page cache: none has a copy, so what is written into it all see."""
    split = faces.split("train")
    path = to_file(split, tmp_path)
    ranks = [DecodedReader(split, open_file(path, split, image_size=32), 0) for _ in range(2)]
    before = [rank.read(3) for rank in ranks]
    assert (before[0] == before[1]).all() and not before[0].flags.writeable
    assert path not in Path("/proc/self/maps").read_text()
    backwards = np.frombuffer(before[0].tobytes(), np.uint64)[::-1].tobytes()  # of the same sum
    with Path(path).open("rb+") as file:
        file.seek(3 * len(backwards))
        file.write(backwards)
    assert [rank.read(3).tobytes() for rank in ranks] == [backwards] * 2


@pytest.mark.parametrize("kind", ["a bit", "cut short", "its sums"])
def test_a_file_that_changes_under_a_training_is_damage(
    faces: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A line for each image that it costs, its substitute, and an end past the limit."""
    split, size = faces.split("train"), 32 * 32 * 3
    path = Path(to_file(split, tmp_path))
    own, plain = reader(split, "host", tmp_path, max_bad=1), reader(split, "device", tmp_path)
    content = bytearray(path.read_bytes())
    content[7 * size + 5] ^= 4
    if kind == "its sums":
        sums = path.with_suffix(".sums")
        sums.write_bytes(sums.read_bytes()[:-8])
        with pytest.raises(OSError, match="is not whole any more; the same command decodes anew"):
            open_file(str(path), split, image_size=32)
        assert to_file(split, tmp_path) == str(path)  # which makes it anew
        return
    path.write_bytes(content if kind == "a bit" else content[: 60 * size])
    hit = 7 if kind == "a bit" else 79
    same = np.flatnonzero(split.index["label"] == split.index["label"][hit])
    substitute = int(same[(np.searchsorted(same, hit) + 1) % len(same)])
    if kind == "a bit":
        assert (own.read(hit) == plain.read(substitute)).all()
        assert f"its pixels in {path} are not those that were decoded" in caplog.text
    else:  # the substitutes are gone as well
        with pytest.raises(TooMuchDamageError, match=r"its pixels in .* remove that file, and the"):
            own.read(hit)
            own.read(hit - 1)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["host", "device"])
def test_a_training_is_the_same(tiny: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    """Of the whole story, by the key; and a run may go on with it."""
    chosen = [f"data.decoded={place}", f"data.cache={tmp_path / 'cache'}"]
    weights = []
    for name, first in (("plain", []), ("decoded", chosen), ("both", [])):
        main(load_config(tiny(name), [*first, "train.max_steps=10"]))
        main(load_config(tiny(name), [*(chosen if name != "plain" else []), "train.max_steps=14"]))
        weights.append(load(step_path(tmp_path / name, 14))["objective"])
    for name, value in weights[0].items():
        assert all(torch.equal(other[name], value) for other in weights[1:]), name


def test_a_file_needs_a_folder(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"data\.decoded: host takes a folder .* set data\.cache"):
        load_config(tiny("run"), ["data.decoded=host"])


def test_what_does_not_fit_is_refused(
    faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    split, need = faces.split("train"), 80 * 32 * 32 * 3
    caplog.set_level(logging.INFO)
    to_file(split, tmp_path)
    assert "80 images of 32 px take 0.00 GB of memory" in caplog.text
    with pytest.raises(ValueError, match=r"set data\.cache"):
        decode_to_file(split, fingerprint="", cache=None, image_size=32, device=CPU, threads=1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match=r"0\.2 MB are needed for the decoded images, 0\.0 MB are"):
        to_file(split, tmp_path / "new")
    monkeypatch.setattr(module, "free_memory", lambda: need - 1)
    with pytest.raises(ValueError, match=r"data\.decoded is host: 80 images of 32 px take .* GB, "):
        to_file(split, tmp_path)
    with pytest.raises(ValueError, match=r"data\.decoded is device: 80 images"):
        decode_to_memory(split, image_size=32, device=CPU, threads=1)
    monkeypatch.setattr(module, "free_memory", lambda: need)
    with pytest.raises(ValueError, match=r"data\.decoded is device"):  # two ranks, two copies
        decode_to_memory(split, image_size=32, device=CPU, threads=1, copies=2)
