"""Splits by the stated rule, and by published lists."""

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import layouts
import pytest
from packs import pack_here, refused
from trees import tree

from shards.format import open_shardset
from shards.release import Content, Item, Release
from shards.releases import affectnet, folder, rafdb
from shards.releases.splitting import assign, divide


def undivided(root: Path, train: int = 10) -> Path:
    tree(root / "made", train=train, val=1)
    for name in ("angry", "happy"):
        (root / "made" / "train" / name).rename(root / name)
    shutil.rmtree(root / "made")
    return root


def test_a_tree_without_splits_is_divided_by_the_stated_rule(tmp_path: Path) -> None:
    root = undivided(tmp_path / "flat")
    assert "--split 0.8 makes splits of them" in refused(root, "folder")
    code, output = pack_here("folder", "--source", root, "--out", tmp_path / "out", "--size", "24",
                             "--split", "0.7", "--workers", "1")  # fmt: skip
    assert code == 0, output
    shards = open_shardset(tmp_path / "out")
    assert shards.counts == {"train": (7, 7), "val": (3, 3)}
    names = sorted((f"{k}.jpg" for k in range(10)),
                   key=lambda name: hashlib.sha256(name.encode()).hexdigest())  # fmt: skip
    val = shards.split("val")
    held = {val.key(k).rpartition("/")[2] for k in range(len(val))}
    assert held == {f"{c}_{name[0]}" for c in ("angry", "happy") for name in names[7:]}
    (tmp_path / "deep").mkdir()
    root.rename(tmp_path / "deep" / "other")
    again = divide(folder.release(tmp_path / "deep", is_divided=True), 0.7)
    assert {item.key for item in again.splits["val"]} == held


def one_class(paths: list[str]) -> Release:
    items = [Item(f"k{number}", 0, path) for number, path in enumerate(paths)]
    return Release("made", "list", ("a",), {"train": items}, lambda item: Content(b""))


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 0.5, (1, 0)), (2, 0.99, (1, 1)), (2, 0.01, (1, 1)), (10, 0.85, (9, 1)), (9, 1, (9, 0))],
)
def test_each_class_is_divided(count: int, share: float, expected: tuple[int, int]) -> None:
    found = divide(one_class([f"{k}.jpg" for k in range(count)]), share).splits
    assert (len(found["train"]), len(found.get("val", ()))) == expected


def test_faces_of_one_photograph_stay_together() -> None:
    found = divide(one_class([f"{k % 20}.jpg" for k in range(60)]), 0.5).splits
    parts = [{item.source for item in items} for items in found.values()]
    assert not parts[0] & parts[1] and 28 <= len(found["train"]) <= 32


def test_splits_that_are_there_are_not_divided_again(tmp_path: Path) -> None:
    tree(tmp_path / "r", train=3, val=2)
    assert "--split 0.5: folder has splits, train, val" in refused(
        tmp_path / "r", "folder", "--split", "0.5"
    )
    shutil.rmtree(tmp_path / "r" / "val")
    assert len(divide(folder.release(tmp_path / "r"), 0.5).splits["val"]) == 2


def test_a_published_partition(tmp_path: Path) -> None:
    """By path, by key and by <split>/<key>; every line is counted, what names nothing is named."""
    layouts.write_rafdb(tmp_path / "raf", 14, 7, seed=0, size=16)
    rows = ["image,split", *(f"train_{k:05d},train" for k in range(1, 8)),
            "./Image/aligned/train_00008_aligned.jpg,Val", "test/test_0001,val",
            "train/train_00009,extra", "train_00099,val", "train_00001,train"]  # fmt: skip
    path = tmp_path / "partition.csv"
    path.write_text("\n".join(rows))
    code, output = pack_here("rafdb", "--source", tmp_path / "raf", "--out", tmp_path / "out",
                             "--size", "16", "--splits", path, "--workers", "1")  # fmt: skip
    assert code == 0 and "11 lines name an image, 1 do not" in output
    assert "line 12: train_00099: in the list of splits, but there is no image" in output
    shards = open_shardset(tmp_path / "out")
    counts = {split: sum(own) for split, own in shards.counts.items()}
    assert counts == {"train": 7, "val": 2, "extra": 1}
    assert shards.dropped == {
        "in the list of splits, but there is no image": 1, "not in partition.csv": 11
    }  # fmt: skip
    assert "splits of partition.csv" in shards.release


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (["train_00001,train", "train_00001,val"], "line 2: train_00001 is in 'val', and in 'tr"),
        (["train_00001,train,1"], "line 1: 'train_00001,train,1', expected <path or key>,<split>"),
        (["path,split", "train_00001,"], "line 2: 'train_00001,', expected"),
        (["none,train"], "no image is in 'train', the list has nothing that is there"),
        (["train_00001,val"], "no image is in 'train', the list has val"),
    ],
)
def test_bad_partitions(tmp_path: Path, rows: list[str], error: str) -> None:
    layouts.write_rafdb(tmp_path / "raf", 7, 7, seed=0, size=16)
    (tmp_path / "p.csv").write_text("\n".join(rows))
    assert error in refused(tmp_path / "raf", "rafdb", "--splits", tmp_path / "p.csv")


def test_a_key_of_several_splits_is_named_by_its_split(tmp_path: Path) -> None:
    layouts.write_affectnet_reduced(tmp_path / "r", 16, 8, size=16, seed=0)
    for suffix in ("images/20.jpg", *(f"annotations/20_{k}.npy" for k in layouts.ANNOTATIONS)):
        home = tmp_path / "r" / "train_set" / suffix
        home.hardlink_to(tmp_path / "r" / "val_set" / suffix)
    release = affectnet.release(tmp_path / "r", size=None, margin=0.0)
    (tmp_path / "p.csv").write_text("val/20,train\ntrain/20,train\n")
    items = assign(release, tmp_path / "p.csv").splits["train"]
    assert Counter(item.key for item in items) == {"20": 1, "val_20": 1}
    (tmp_path / "p.csv").write_text("20,train\n")
    with pytest.raises(ValueError, match=r"line 1: 20 names several images; name its path"):
        assign(affectnet.release(tmp_path / "r", size=None, margin=0.0), tmp_path / "p.csv")


def test_the_classes_order_is_the_releases(tmp_path: Path) -> None:
    layouts.write_rafdb(tmp_path / "raf", 7, 7, seed=0, size=16)
    (tmp_path / "p.csv").write_text("test_0003,train\n")
    found = assign(rafdb.release(tmp_path / "raf"), tmp_path / "p.csv")
    assert found.class_names == rafdb.CLASSES and found.splits["train"][0].label == 2
