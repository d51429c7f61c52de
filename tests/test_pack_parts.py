"""Packs in parts: several at once are the whole, and two packs do not meet."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packs import pack_here
from trees import digests, packed, tree

from conftest import REPOSITORY, run
from shards.format import MANIFEST, open_shardset
from shards.packing.claim import STATE
from shards.packing.writer import merge, pack
from shards.releases import folder


def test_parts_packed_at_once_and_merged_are_the_whole(shards: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "parts"
    command = [sys.executable, "-m", "shards.pack", "folder", "--source", str(source), "--out",
               str(out), "--size", "24", "--shard-size", "4", "--workers", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parts = [subprocess.Popen([*command, "--part", f"{k}/3"], env=environment) for k in (1, 3)]
    assert [process.wait(60) for process in parts] == [0, 0]
    code, output = pack_here("merge", "--out", out)
    assert code == 2 and "3 of 8 shards are not packed yet (train-00-00001 is" in output
    assert not (out / MANIFEST).exists()
    assert run(*command, "--part", "2/3", cwd=tmp_path).returncode == 0
    assert run(sys.executable, "-m", "shards.pack", "merge", "--out", out, cwd=tmp_path).stdout
    assert digests(out) == digests(shards)
    code, output = pack_here("merge", "--out", tmp_path)
    assert code == 2 and "no parts were packed" in output


def test_parts_that_start_together_do_not_meet(shards: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from shards.packing.writer import pack\nfrom shards.releases import folder\n"
        "release = folder.release('source')\n"
        "for k in range(8):\n"
        "    time.sleep(max(0, float(sys.argv[2]) + 0.5 * k - time.time()))\n"
        "    pack(release, f'out{k}', size=24, workers=1, shard_size=4,\n"
        "         part=(int(sys.argv[1]), 4), progress=False)\n"
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
    pack(release, out, size=24, workers=1, shard_size=4, part=(1, 2))
    with pytest.raises(ValueError, match="holds an unfinished pack in 2 parts, not in 3"):
        pack(release, out, size=24, workers=1, shard_size=4, part=(2, 3))


def test_shards_of_two_sizes_do_not_meet(shards: Path) -> None:
    """9 images of a class are two shards of one name each, whether of 5 or of 6 images."""
    release, out = folder.release(shards.parent / "source"), shards.parent / "parts"
    options = {"size": 24, "workers": 1}
    pack(release, out, shard_size=5, part=(1, 2), **options)
    with pytest.raises(ValueError, match="an unfinished pack of another source or other options"):
        pack(release, out, shard_size=6, part=(2, 2), **options)
    state = json.loads((out / STATE).read_text())
    del state["shard_size"]  # as former versions left it
    (out / STATE).write_text(json.dumps(state))
    pack(release, out, shard_size=6, part=(2, 2), **options)
    with pytest.raises(ValueError, match="not all were packed with the same --shard-size"):
        merge(out)


def test_merge_judges_over_all_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = tree(tmp_path / "source", train=101, val=49), tmp_path / "out"
    options = {"size": 24, "workers": 1, "shard_size": 50}
    for k in (10, 11, 12):  # 3 of 300, all in one shard
        (source / "train" / "angry" / f"{k}.jpg").write_bytes(b"nothing")
    for part in range(1, 9):
        pack(folder.release(source), out, part=(part, 8), **options)
    assert "3 of this part's 50 images are unreadable" in caplog.text
    assert merge(out) and open_shardset(out).counts["train"] == (98, 101)
    shutil.rmtree(out)
    (source / "train" / "happy" / "13.jpg").write_bytes(b"nothing")
    for part in range(1, 9):
        pack(folder.release(source), out, part=(part, 8), **options)
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
