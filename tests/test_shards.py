"""The shard format and the packer, through the real command where a user would use it."""

import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from conftest import REPOSITORY, damaged_scans, run
from shards.format import INDEX_DTYPE, MANIFEST, open_shardset
from shards.releases import folder
from shards.packing import writer
from shards.packing.claim import CONTACT_SHEET
from shards.images import plain_jpeg_size, to_jpeg
from shards.release import Item
from shards.packing.writer import merge, pack

CLASSES = ("angry", "happy")


def picture(seed: int, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)  # smooth: JPEG is close
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tree(root: Path, *, train: int = 9, val: int = 3) -> Path:
    """A folder data set of plain 24 px JPEGs."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            path = root / split / name
            path.mkdir(parents=True)
            for k in range(count):
                jpeg = encoded(picture(1000 * label + 10 * k + (split == "val")), "JPEG")
                (path / f"{k}.jpg").write_bytes(jpeg)
    return root


def digests(root: Path) -> dict[str, str]:
    files = [p for p in root.iterdir() if p.name != CONTACT_SHEET and p.suffix != ".lock"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def packed(source: Path, out: Path, **options: object) -> Path:
    pack(folder.release(source), out, **({"size": 24, "workers": 1, "shard_size": 4} | options))
    return out


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return packed(tree(tmp_path / "source"), tmp_path / "out")


def test_every_image_is_where_the_index_says(shards: Path) -> None:
    opened = open_shardset(shards)
    assert opened.class_names == CLASSES and opened.image_size == 24
    assert opened.counts == {"train": (9, 9), "val": (3, 3)}
    split = opened.split("train")
    assert split.index.dtype == INDEX_DTYPE and isinstance(split.index, np.memmap)
    sources = {p.read_bytes() for p in (shards.parent / "source" / "train").rglob("*.jpg")}
    for sample, row in enumerate(split.index):
        data = split.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert data in sources  # the original bytes
        assert zlib.crc32(data) == row["crc32"]
        assert split.shards[row["shard"]].label == row["label"]
        assert f"/{CLASSES[row['label']]}_" in split.key(sample)
    for shard in split.shards:
        content = (shards / shard.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        assert len(content) == shard.size_bytes


def test_webdataset_reads_the_tars(shards: Path) -> None:
    split = open_shardset(shards).split("train")
    urls = [str(shards / s.name) for s in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(split)
    for sample, row in zip(samples, split.index, strict=True):
        assert zlib.crc32(sample["jpg"]) == row["crc32"]
        assert int(sample["cls"]) == row["label"]


def test_dali_reads_the_tars_by_their_idx(shards: Path) -> None:
    split = open_shardset(shards).split("train")

    @pipeline_def(batch_size=len(split), num_threads=1, device_id=None)
    def reader():  # type: ignore[no-untyped-def]
        return tuple(
            fn.readers.webdataset(
                paths=[str(shards / s.name) for s in split.shards],
                index_paths=[str(shards / s.name.replace(".tar", ".idx")) for s in split.shards],
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
        )

    jpegs, labels = reader().run()
    assert [zlib.crc32(bytes(np.asarray(x))) for x in jpegs] == split.index["crc32"].tolist()
    assert [int(bytes(np.asarray(x))) for x in labels] == split.index["label"].tolist()


def test_the_idx_is_what_dalis_own_tool_writes(shards: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    if not tool.exists():
        pytest.skip("this DALI comes without wds2idx")
    for tar in sorted(shards.glob("*.tar")):
        done = run(tool, tar, tmp_path / "theirs.idx", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        theirs = (tmp_path / "theirs.idx").read_text().split()
        assert tar.with_suffix(".idx").read_text().split() == theirs


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif.tobytes())


KINDS: dict[str, tuple[Callable[[], bytes], bool]] = {  # name → bytes, kept as they are
    "plain": (lambda: encoded(picture(0), "JPEG"), True),
    "progressive": (lambda: encoded(picture(0), "JPEG", progressive=True), True),
    "gray": (lambda: encoded(picture(0, mode="L"), "JPEG"), True),
    "4:4:4": (lambda: encoded(picture(0), "JPEG", subsampling=0), True),
    "with EXIF, upright": (lambda: encoded(picture(0), "JPEG", exif=Image.Exif().tobytes()), True),
    "other size": (lambda: encoded(picture(0, (31, 17)), "JPEG"), False),
    "rotated by EXIF": (lambda: rotated(picture(0)), False),
    "trailing junk": (lambda: encoded(picture(0), "JPEG") + b"junk", False),
    "CMYK": (lambda: encoded(picture(0, mode="CMYK"), "JPEG"), False),
    "PNG": (lambda: encoded(picture(0), "PNG"), False),
    "16-bit PNG": (
        lambda: encoded(Image.fromarray(np.full((24, 24), 40_000, np.uint16)), "PNG"),
        False,
    ),
    "transparent": (lambda: encoded(picture(0, mode="RGBA"), "PNG"), False),
    "animated GIF": (
        lambda: encoded(picture(0), "GIF", save_all=True, append_images=[picture(1)]),
        False,
    ),
    "palette GIF": (lambda: encoded(picture(0, mode="P"), "GIF"), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_and_what_is_encoded_anew(kind: str) -> None:
    make, kept = KINDS[kind]
    data = make()
    jpeg, verbatim = to_jpeg(data, 24)
    assert verbatim == kept and (jpeg == data) == kept
    assert plain_jpeg_size(jpeg) == (24, 24)
    image = Image.open(io.BytesIO(jpeg))
    assert image.mode in ("RGB", "L")
    if kind == "16-bit PNG":
        assert abs(np.asarray(image).mean() - 40_000 / 256) < 2
    if kind == "rotated by EXIF":
        upright = np.asarray(picture(0).rotate(-90)).astype(int)
        assert np.abs(np.asarray(image).astype(int) - upright).mean() < 10
    if kind == "other size":
        whole = picture(0, (31, 17)).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(whole).astype(int)).mean() < 10
        assert to_jpeg(data, None) == (data, True)  # native sizes keep it


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "L"])
def test_images_made_in_memory_need_not_be_rgb(mode: str) -> None:
    jpeg, verbatim = to_jpeg(picture(0, (30, 30), mode), 24)
    assert not verbatim and plain_jpeg_size(jpeg) == (24, 24)


def bad_exif() -> bytes:
    """To be turned upright, and beside it a width that is text."""
    width, turned = b"\1\0\0\2\0\0\0\2a\0\0\0", b"\1\x12\0\3\0\0\0\1\0\6\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + width + turned + bytes(4)
    return encoded(picture(0), "JPEG", exif=exif)


def bad_tiff() -> bytes:
    """Its pixels stand at an offset that is no whole number."""
    tiff = encoded(picture(0), "TIFF")
    entry = tiff.index(struct.pack("<HHI", 273, 4, 1))
    return tiff[: entry + 2] + struct.pack("<HIf", 11, 1, 8.5) + tiff[entry + 12 :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bad_exif(),
        bad_tiff(),
        b"\xff\xd8\xff\xc0\x00\x08\x08\x00\x18\x00\x18\x03\xff\xd9",
        b"GIF89a",
        b"<html>",
        encoded(picture(0), "JPEG")[:300],
        bytes(500),
    ],
)
def test_unreadable_bytes_are_refused(data: bytes) -> None:
    assert plain_jpeg_size(data) is None
    with pytest.raises(ValueError, match=r"cannot be decoded|is empty"):
        to_jpeg(data, 24)


@pytest.mark.parametrize("kind", ["no scan", "no table"])
def test_jpegs_that_lack_what_decoding_needs_are_no_plain_ones(kind: str) -> None:
    assert plain_jpeg_size(damaged_scans(encoded(picture(0), "JPEG"))[kind]) is None


def test_cut_jpegs_are_not_encoded_anew() -> None:
    jpeg = encoded(picture(0, (96, 96)), "JPEG", quality=95)
    for kind in ("cut", "no scan", "no table"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            to_jpeg(damaged_scans(jpeg)[kind], 24)


def test_image_bombs_are_refused_undecoded() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ValueError, match=r"20000×20000 pixels|exceeds limit"):
        to_jpeg(bomb, 24)


def test_unreadable_images_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tree(tmp_path / "source", train=110)
    (source / "train" / "happy" / "7.jpg").write_bytes(b"nothing")
    out = packed(source, tmp_path / "out", shard_size=50)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["dropped"] == {"unreadable": 1}
    assert "happy/7.jpg" in manifest["dropped_names"][0] and "happy/7.jpg" in caplog.text
    assert open_shardset(out).counts["train"] == (110, 109)


def test_more_than_one_per_cent_unreadable_stops_the_pack(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    (source / "train" / "happy" / "7.jpg").write_bytes(b"nothing")
    for _ in range(3):  # however often it is tried
        with pytest.raises(ValueError, match=r"1 of 24 images are unreadable .*happy/7\.jpg.* 1%"):
            packed(source, tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="no finished shards"):
            open_shardset(tmp_path / "out")
    shutil.copy(source / "train" / "happy" / "6.jpg", source / "train" / "happy" / "7.jpg")
    assert open_shardset(packed(source, tmp_path / "out")).counts["train"] == (9, 9)


def test_a_shard_of_unreadable_images_alone_is_not_shipped(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=101)
    (source / "train" / "happy" / "99.jpg").write_bytes(b"nothing")  # by name, the last
    out = packed(source, tmp_path / "out", shard_size=100)
    assert [s.samples for s in open_shardset(out).split("train").shards] == [100, 1, 100]
    assert len(list(out.glob("*.tar"))) == len(list(out.glob("*.idx"))) == 5
    again = packed(source, tmp_path / "again", shard_size=100, workers=2)
    assert digests(again) == digests(out)  # the reasons in the manifest, too


def test_workers_do_not_change_a_byte(shards: Path, tmp_path: Path) -> None:
    again = packed(tmp_path / "source", tmp_path / "again", workers=2)
    assert digests(again) == digests(shards)
    assert MANIFEST in digests(again) and not list(again.glob("*.done"))


def test_parts_packed_at_once_and_merged_are_the_whole(shards: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "parts"
    command = [sys.executable, "-m", "shards.pack", "folder", "--source", str(source), "--out",
               str(out), "--size", "24", "--shard-size", "4", "--workers", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parts = [subprocess.Popen([*command, "--part", f"{k}/3"], env=environment) for k in (1, 3)]
    assert [process.wait(60) for process in parts] == [0, 0]
    assert "4 of 8 shards are not packed yet (train-00-00001 is" in fails(
        "merge", "--out", out, cwd=tmp_path
    ).replace("3 of 8", "4 of 8")
    assert not (out / MANIFEST).exists()
    assert run(*command, "--part", "2/3", cwd=tmp_path).returncode == 0
    assert run(sys.executable, "-m", "shards.pack", "merge", "--out", out, cwd=tmp_path).stdout
    assert digests(out) == digests(shards)
    assert "no parts were packed" in fails("merge", "--out", tmp_path, cwd=tmp_path)


def test_a_finished_pack_is_left_as_it_is(shards: Path, tmp_path: Path) -> None:
    before = digests(shards), (shards / MANIFEST).stat().st_mtime_ns
    elsewhere = shutil.copytree(tmp_path / "source", tmp_path / "mounted" / "elsewhere")
    packed(elsewhere, shards, workers=2)
    assert pack(folder.release(elsewhere), shards, size=24, shard_size=4, part=2, parts=3) is None
    assert merge(shards) == shards / MANIFEST
    assert (digests(shards), (shards / MANIFEST).stat().st_mtime_ns) == before
    (shards / "train-00-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00-00001\.tar not found"):
        packed(elsewhere, shards)


def test_where_the_source_lies_changes_no_byte(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=110)
    (source / "train" / "happy" / "0.jpg").write_bytes(b"nothing")
    (source / "train" / "happy" / "1.jpg").unlink()
    (source / "train" / "happy" / "1.jpg").symlink_to("/etc/hostname")
    (source / "train" / "angry" / "deeper").mkdir()
    (source / "train" / "angry" / "deeper" / "1.jpg").write_bytes(b"unseen")
    (source / "train" / "angry" / "Thumbs.db").write_bytes(b"no image")
    os.mkfifo(source / "train" / "angry" / "pipe.jpg")
    out = packed(source, tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["dropped"] == {
        "deeper than a class's folder": 1, "no regular file": 1,
        "a link that leads out of the source": 1, "unreadable": 1,
    }  # fmt: skip
    assert not any(str(tmp_path) in name for name in manifest["dropped_names"])
    source.rename(tmp_path / "moved")
    assert digests(packed(tmp_path / "moved", tmp_path / "again")) == digests(out)


class Killed(BaseException):
    pass


def killed_at(patched: pytest.MonkeyPatch, target: str, count: int) -> None:
    """The process ends after `count` calls of a function of Path or of the writer."""
    owner = Path if target == "unlink" else writer
    original, calls = getattr(owner, target), []

    def call(*arguments: object, **options: object) -> object:
        if len(calls) == count:
            raise Killed
        calls.append(1)
        return original(*arguments, **options)

    patched.setattr(owner, target, call)


@pytest.mark.parametrize("count", [3, 4, 6, 9])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_kill_while_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, parts: int
) -> None:
    source, out = tree(tmp_path / "source", train=101), tmp_path / "out"
    (source / "train" / "happy" / "99.jpg").write_bytes(b"nothing")  # by name, the last
    options = {"size": 24, "workers": 1, "shard_size": 100}
    release = folder.release(source)
    for part in range(1, parts):
        pack(release, out, part=part, parts=parts, **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(patched, "unlink", count)
        pack(release, out, part=parts, parts=parts, **options)
        merge(out)
    assert (out / MANIFEST).exists()
    if parts == 1:
        pack(release, out, **options)
    else:
        merge(out)
    assert digests(out) == digests(packed(source, tmp_path / "whole", shard_size=100))


def remove(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).unlink()


def leave(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_bytes(b"half")


@pytest.mark.parametrize(
    "damage",
    [remove("train-00-00000.tar"), remove("train-00-00000.idx"), leave("train-00-00000.tar"),
     leave("train-00-00000.idx"), leave("train-00-00000.done"), remove("packing.lock"),
     leave("packing.json.0a1b2c3d.partial"), leave("train-01-00000.tar.0a1b2c3d.partial"),
     lambda out: [p.rename(f"{p}.0a1b2c3d.partial") for p in out.glob("[pt]*[!k]")]],
)  # fmt: skip
def test_what_a_kill_left_is_not_trusted(
    shards: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    out = shards.parent / "killed"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(patched, "write_job", 3)
        packed(shards.parent / "source", out)
    damage(out)
    assert digests(packed(shards.parent / "source", out)) == digests(shards)


def test_a_source_that_is_away_for_a_while_changes_nothing(shards: Path) -> None:
    """What cannot be read is no damaged image."""
    source, out = shards.parent / "source", shards.parent / "again"
    release = folder.release(source)
    (source / "train" / "happy").rename(shards.parent / "away")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '/.*happy/0\.jpg'"):
        pack(release, out, size=24, workers=1, shard_size=4)
    assert not (out / "train-01-00000.done").exists() and (out / "train-00-00000.done").exists()
    (shards.parent / "away").rename(source / "train" / "happy")
    assert digests(packed(source, out)) == digests(shards)


def test_a_read_error_stops_the_pack(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(item: Item) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), item.source)

    release = dataclasses.replace(folder.release(shards.parent / "source"), read=failing)
    with pytest.raises(OSError, match=r"Input/output error: 'train/angry/0\.jpg'"):
        pack(release, shards.parent / "again", size=24, workers=1)


def test_parts_that_start_together_do_not_meet(shards: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom shards import folder\nfrom shards.writer import pack\n"
        "release = folder.release('source')\n"
        "for k in range(8):\n"
        "    time.sleep(max(0, float(sys.argv[2]) + 0.5 * k - time.time()))\n"
        "    pack(release, f'out{k}', size=24, workers=1, shard_size=4, part=int(sys.argv[1]),\n"
        "         parts=4, progress=False)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(part), str(time.time() + 2)], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for part in range(1, 5)
    ]  # fmt: skip
    assert [process.wait(60) for process in processes] == [0] * 4
    for k in range(8):
        merge(tmp_path / f"out{k}")
        assert digests(tmp_path / f"out{k}") == digests(shards)


def test_parts_of_two_counts_are_refused(shards: Path) -> None:
    release, out = folder.release(shards.parent / "source"), shards.parent / "parts"
    pack(release, out, size=24, workers=1, shard_size=4, part=1, parts=2)
    with pytest.raises(ValueError, match="holds an unfinished pack in 2 parts, not in 3"):
        pack(release, out, size=24, workers=1, shard_size=4, part=2, parts=3)


def test_merge_judges_over_all_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = tree(tmp_path / "source", train=101, val=49), tmp_path / "out"
    options = {"size": 24, "workers": 1, "shard_size": 50, "parts": 8}
    for k in (10, 11, 12):  # 3 of 300, all in one shard
        (source / "train" / "angry" / f"{k}.jpg").write_bytes(b"nothing")
    for part in range(1, 9):
        pack(folder.release(source), out, part=part, **options)
    assert "3 of this part's 50 images are unreadable" in caplog.text
    assert merge(out) and open_shardset(out).counts["train"] == (98, 101)
    shutil.rmtree(out)
    (source / "train" / "happy" / "13.jpg").write_bytes(b"nothing")
    for part in range(1, 9):
        pack(folder.release(source), out, part=part, **options)
    with pytest.raises(ValueError, match="4 of 300 images are unreadable"):
        merge(out)


def test_two_packs_into_one_folder_do_not_meet(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "twice"
    out.mkdir()
    with (out / "packing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is packing into it"):
            packed(tmp_path / "source", out)
        (out / "packing.json").write_text("{}")
        with pytest.raises(OSError, match="another process is packing into it"):
            merge(out)
    (out / "packing.json").unlink()
    assert digests(packed(tmp_path / "source", out)) == digests(shards)


def test_a_pack_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=300, val=10)
    command = [sys.executable, "-m", "shards.pack", "folder", "--source", str(source), "--size",
               "96", "--shard-size", "20", "--workers", "2", "--out"]  # fmt: skip
    began = time.monotonic()
    assert run(*command, tmp_path / "whole", cwd=tmp_path).returncode == 0
    duration_s, whole = time.monotonic() - began, digests(tmp_path / "whole")
    sheet = (tmp_path / "whole" / CONTACT_SHEET).read_bytes()
    interrupted = 0
    for k in range(10):
        out = tmp_path / f"out{k}"
        moment_s = random.uniform(0.3, 1.0) * duration_s
        process = subprocess.Popen(
            [*command, str(out)], cwd=tmp_path, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
        )  # fmt: skip
        time.sleep(moment_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        interrupted += bool(out.exists() and list(out.glob("*.done")))
        done = run(*command, out, cwd=tmp_path)  # also after the manifest is there
        assert done.returncode == 0 and "packed into" in done.stdout, done.stderr
        assert (out / CONTACT_SHEET).read_bytes() == sheet
        assert digests(out) == whole, f"killed after {moment_s:.2f} of {duration_s:.2f} s"
    assert interrupted  # some kills met the pack at work


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_pack_leaves_no_process_and_no_manifest(tmp_path: Path, number: int) -> None:
    source, out = tree(tmp_path / "source", train=400), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "shards.pack", "folder", "--source", source, "--out", out,
         "--size", "256", "--shard-size", "20", "--workers", "2"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob("*.done")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)  # to the command alone, not to its workers
    assert process.wait(30) in (143, -number)
    with pytest.raises(ProcessLookupError):  # raised once its process group is empty
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (out / MANIFEST).exists()


def fails(*arguments: str | Path, cwd: Path) -> str:
    """The one line that the packer says of bad input."""
    done = run(sys.executable, "-m", "shards.pack", *arguments, cwd=cwd)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


def test_bad_input_gets_one_line_and_exit_code_2(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=2, val=1)
    command = ("folder", "--source", source, "--out")
    line = fails(*command[:2], tmp_path / "no", "--out", tmp_path / "out", cwd=tmp_path)
    assert f"{tmp_path}/no/train not found" in line
    (source / "val" / "bored").mkdir()
    assert "class 'bored' is not in train/" in fails(*command, tmp_path / "out", cwd=tmp_path)
    shutil.rmtree(source / "val" / "bored")
    assert "is a file" in fails(*command, source / "val" / "angry" / "0.jpg", cwd=tmp_path)


def test_other_folders_need_overwrite_and_foreign_files_stay(shards: Path) -> None:
    source = shards.parent / "source"
    with pytest.raises(ValueError, match="holds finished shards; choose another"):
        packed(source, shards, shard_size=9)
    packed(source, shards, shard_size=9, overwrite=True)
    assert open_shardset(shards).split("train").shards[0].samples == 9
    for name in ("thesis.tex", "thesis-2024-11.tar"):
        (shards / name).write_text("years of work")
        with pytest.raises(ValueError, match=rf"{name}, which no pack wrote"):
            packed(source, shards, overwrite=True)
        assert open_shardset(shards)  # nothing was removed
        (shards / name).unlink()


@pytest.mark.parametrize(
    ("key", "label", "line"),
    [("a.b", 0, "without dots"), ("a/b", 0, "without dots"), ("k" * 91, 0, "1 to 90 bytes"),
     ("k", 2, "label 2"), ("angry_0", 0, "'angry_0' stands 2 times")],
)  # fmt: skip
def test_impossible_items_are_refused(tmp_path: Path, key: str, label: int, line: str) -> None:
    release = folder.release(tree(tmp_path / "source"))
    release.splits["train"].append(Item(key, label, release.splits["train"][0].source))
    with pytest.raises(ValueError, match=line):
        pack(release, tmp_path / "out", size=24)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_refused(tmp_path: Path, split: str) -> None:
    source = tree(tmp_path / "source", **{split: 0})
    with pytest.raises(ValueError, match=f"split '{split}' holds no images"):
        packed(source, tmp_path / "out")


def test_links_out_of_the_source_are_not_followed(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(picture(5), "JPEG"))
    (source / "train" / "happy" / "link.jpg").symlink_to(secret)
    (source / "train" / "sad").symlink_to(tree(tmp_path / "other") / "val" / "angry")
    release = folder.release(source)
    assert release.class_names == CLASSES and len(release.splits["train"]) == 18


def test_names_in_any_script_are_packed_apart(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=1, val=1)
    jpeg = encoded(picture(1), "JPEG")
    for k in range(120):
        (source / "train" / "happy" / f"{chr(0x4E00 + k)}的脸.jpg").write_bytes(jpeg)
    counts = open_shardset(packed(source, tmp_path / "out")).counts
    assert counts["train"] == (1, 121)


def test_a_split_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    shutil.copytree(source / "val", os.fsdecode(os.fsencode(source) + b"/t\xe9st"))
    with pytest.raises(ValueError, match=r"split 't\\udce9st' has no printable name"):
        packed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_any_bytes(tmp_path: Path) -> None:
    source = tree(tmp_path / os.fsdecode(b"caf\xe9"), train=2, val=1)
    done = run(sys.executable, "-m", "shards.pack", "folder", "--source", source, "--out",
               source / "out", "--size", "24", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "caf\\xe9/out" in done.stdout, done.stderr


def test_files_that_share_a_stem_keep_apart(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=1, val=1)
    (source / "train" / "happy_a").mkdir()
    for name in ("a b.jpg", "a.b.jpg", "0.png", "n" * 200 + ".jpg", "n" * 201 + ".jpg", "é.jpg"):
        (source / "train" / "happy" / name).write_bytes(encoded(picture(1), "JPEG"))
    (source / "train" / "happy_a" / "b.jpg").write_bytes(encoded(picture(1), "JPEG"))
    keys = [item.key for item in folder.release(source).splits["train"]]
    assert len(set(keys)) == len(keys) == 9
    packed(source, tmp_path / "out")  # which refuses keys that a tar would not keep


def edit(shards: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    change(manifest)
    (shards / MANIFEST).write_text(json.dumps(manifest))


def test_damaged_sets_are_refused_by_name(shards: Path) -> None:
    tar = shards / "train-01-00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    expected = rf"{tar.name} holds {len(whole) - 512} bytes, the manifest says {len(whole)}"
    with pytest.raises(ValueError, match=expected):
        open_shardset(shards).split("train")
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tar.name} not found"):
        open_shardset(shards).split("train")
    tar.write_bytes(whole)
    index = np.load(shards / "index-train.npy")
    np.save(shards / "index-train.npy", index[:-1])
    with pytest.raises(ValueError, match=r"index-train\.npy: .* the manifest says 18 samples"):
        open_shardset(shards).split("train")
    with pytest.raises(ValueError, match="no split 'test', it has train, val"):
        open_shardset(shards).split("test")


@pytest.mark.parametrize("name", ["../elsewhere.tar", "/etc/passwd", ".."])
def test_a_manifest_cannot_name_files_elsewhere(shards: Path, name: str) -> None:
    edit(shards, lambda m: m["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(ValueError, match="is not a plain file name"):
        open_shardset(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(class_names="ab"),
        lambda m: m.update(image_size="big"),
        lambda m: m["splits"]["train"].update(counts=[9]),
        lambda m: m["splits"]["train"]["shards"][0].update(samples="4"),
        lambda m: m["splits"]["train"]["shards"][0].update(label=2),
    ],
)
def test_manifest_values_of_a_wrong_kind_are_refused(
    shards: Path, change: Callable[[dict], object]
) -> None:
    edit(shards, change)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards: .*"):
        open_shardset(shards)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard", -1), ("label", 2), ("size", 0), ("offset", -1), ("offset", 2**63 - 2)],
)
def test_index_values_out_of_range_are_refused(shards: Path, field: str, value: int) -> None:
    index = np.load(shards / "index-train.npy")
    index[field][3] = value
    np.save(shards / "index-train.npy", index)
    with pytest.raises(ValueError, match=rf"{field} {value}, expected 0 to|outside its shard"):
        open_shardset(shards).split("train")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x93NUMPY\x01\x00\x04\x00{[[["])
def test_a_file_that_is_no_index_is_refused(shards: Path, content: bytes) -> None:
    (shards / "index-train.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"index-train\.npy: not an index"):
        open_shardset(shards).split("train")


def test_a_broken_manifest_is_refused(shards: Path) -> None:
    edit(shards, lambda m: m.pop("class_names"))
    with pytest.raises(ValueError, match=r"manifest\.json: .*'class_names' is missing"):
        open_shardset(shards)
    (shards / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards"):
        open_shardset(shards)
