"""Packing: the same source gives the same bytes; what is left out and what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import digests, encoded, packed, tree

from conftest import run
from shards.format import MANIFEST, open_shardset
from shards.packing.writer import merge, pack
from shards.release import Item
from shards.releases import folder


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


def test_a_split_of_several_guessed_depths_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A set of 14 bits in PNGs of 16, of which one face in the dark looks like one of 12 bits."""
    source = tree(tmp_path / "source")
    for path in source.glob("*/happy/*.jpg"):
        top = 4000 if path.parts[-3:] == ("train", "happy", "5.jpg") else 16_000
        deep = np.linspace(0, top, 576).astype(np.uint16).reshape(24, 24)
        path.write_bytes(encoded(Image.fromarray(deep), "PNG"))
    packed(source, tmp_path / "out", workers=2)
    lines = [r.getMessage() for r in caplog.records if "guessed by the largest" in r.getMessage()]
    assert len(lines) == 1 and "images of split 'train' have more than 8 bits" in lines[0]
    assert ": 1 with 4095 as white, 8 with 16383 as white; " in lines[0]


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


def test_a_finished_pack_is_left_as_it_is(shards: Path, tmp_path: Path) -> None:
    before = digests(shards), (shards / MANIFEST).stat().st_mtime_ns
    elsewhere = shutil.copytree(tmp_path / "source", tmp_path / "mounted" / "elsewhere")
    packed(elsewhere, shards, workers=2)
    assert pack(folder.release(elsewhere), shards, size=24, shard_size=4, part=(2, 3)) is None
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


def fails(*arguments: str | Path, cwd: Path) -> str:
    """The one line that the command prints for bad input."""
    done = run(sys.executable, "-m", "shards.pack", *arguments, cwd=cwd)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


def test_bad_input_gets_one_line_and_exit_code_2(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=2, val=1)
    command = ("folder", "--source", source, "--out")
    line = fails(*command[:2], tmp_path / "no", "--out", tmp_path / "out", cwd=tmp_path)
    assert f"{tmp_path}/no not found" in line
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


def test_a_split_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    shutil.copytree(source / "val", os.fsdecode(os.fsencode(source) + b"/t\xe9st"))
    with pytest.raises(ValueError, match=r"split 't\\udce9st' has no plain printable name"):
        packed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil", "fold/1", "/evil", ".", ""])
def test_a_split_whose_name_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    release = folder.release(tree(tmp_path / "source"))
    release.splits[name] = release.splits.pop("val")
    with pytest.raises(ValueError, match="has no plain printable name"):
        pack(release, tmp_path / "out", size=24)
    assert not (tmp_path / "out").exists()


def test_folders_of_any_bytes(tmp_path: Path) -> None:
    source = tree(tmp_path / os.fsdecode(b"caf\xe9"), train=2, val=1)
    done = run(sys.executable, "-m", "shards.pack", "folder", "--source", source, "--out",
               source / "out", "--size", "24", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "caf\\xe9/out" in done.stdout, done.stderr
