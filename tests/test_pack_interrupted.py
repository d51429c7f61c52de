"""Interrupted packs: kills, full disks and absent sources; the same command ends the same."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
from interpreter import python
from packs import pack_here
from trees import digests, packed, tree

from conftest import REPOSITORY, run
from shards.format import MANIFEST
from shards.packing import writer
from shards.packing.claim import CONTACT_SHEET
from shards.packing.writer import merge, pack
from shards.release import Item, Release
from shards.releases import folder


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
        pack(release, out, part=(part, parts), **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(patched, "unlink", count)
        pack(release, out, part=(parts, parts), **options)
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


def test_a_read_error_stops_the_pack(shards: Path) -> None:
    def failing(item: Item) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), item.source)

    release = dataclasses.replace(folder.release(shards.parent / "source"), read=failing)
    with pytest.raises(OSError, match=r"Input/output error: 'train/angry/0\.jpg'"):
        pack(release, shards.parent / "again", size=24, workers=1)


@pytest.mark.slow
def test_a_pack_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=150, val=10)
    command = [sys.executable, "-m", "shards.pack", "folder", "--source", str(source), "--size",
               "96", "--shard-size", "20", "--workers", "2", "--out"]  # fmt: skip
    began = time.monotonic()
    assert run(*command, tmp_path / "whole", cwd=tmp_path).returncode == 0
    duration_s, whole = time.monotonic() - began, digests(tmp_path / "whole")
    sheet = (tmp_path / "whole" / CONTACT_SHEET).read_bytes()
    interrupted = 0
    for k in range(8):
        out = tmp_path / f"out{k}"
        moment_s = random.uniform(0.3, 1.0) * duration_s
        process = subprocess.Popen(
            [*command, str(out)], cwd=tmp_path, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
        )  # fmt: skip
        if k % 2:
            time.sleep(moment_s)
        while k % 2 == 0 and process.poll() is None and not [*out.glob("*.done")]:
            time.sleep(0.005)  # until it is at work
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        interrupted += bool(out.exists() and list(out.glob("*.done")))
        # Also after the manifest is there. One worker, as it starts sooner.
        code, output = pack_here(*command[3:], out, "--workers", "1")
        assert code == 0 and "packed into" in output, output
        assert (out / CONTACT_SHEET).read_bytes() == sheet
        assert digests(out) == whole, f"killed after {moment_s:.2f} of {duration_s:.2f} s"
    assert interrupted  # some kills met the pack at work


@pytest.mark.slow
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


def vanishing(item: Item) -> None:
    raise FileNotFoundError(2, "No such file or directory", item.source)


def test_a_source_that_vanishes_midway_stops_the_pack(tmp_path: Path) -> None:
    items = [Item(f"k{k}", 0, f"{k}.jpg") for k in range(50)]
    release = Release("gone", "x", ("only",), {"train": items}, vanishing)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '0\.jpg'"):
        pack(release, tmp_path / "out", size=32, workers=1, shard_size=10)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_packing_goes_on(tmp_path: Path) -> None:
    """On a real file system of 300 KB, in a mount namespace of its own."""
    reduced, disk = tmp_path / "reduced", tmp_path / "disk"
    layouts.write_affectnet_reduced(reduced, 48, 24, size=64, seed=0)
    disk.mkdir()
    command = (
        f"mount -t tmpfs -o size=300k tmpfs {disk} && {python()} -m shards.pack affectnet "
        f"--source {reduced} --out {disk}/out --size 224 --shard-size 4 --workers 2; echo code $?; "
        f"ls {disk}/out; mount -o remount,size=50m {disk}; {python()} -m shards.pack "
        f"affectnet --source {reduced} --out {disk}/out --size 224 --shard-size 4 --workers 2; "
        f"{python()} -m shards.verify {disk}/out"
    )
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("mounting needs root")
    done = run("unshare", "-m", "sh", "-c", command, cwd=tmp_path)
    assert "code 2" in done.stdout and "No space left on device" in done.stderr
    listing = done.stdout.split("code 2")[1].split("class")[0]
    assert "packing.json" in listing and "manifest.json" not in listing
    assert "partial" not in listing and ".done" in listing
    assert "72 images, all as they should be" in done.stdout, done.stdout + done.stderr
