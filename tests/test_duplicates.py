"""Images that stand in a set more than once are named at the end of a pack and by verify."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from trees import packed, replace_index, tree

from shards import pack, verify
from shards.duplicates import describe_duplicates, join_groups
from shards.format import ShardSet, open_shardset


def test_groupings_are_joined_over_each_other() -> None:
    """Numbers are those of the first grouping, the least of each group; names count as well."""
    marks, films = np.array([9, 7, 8, 9, 5]), np.array(["b", "a", "a", "c", "d"])
    assert join_groups([marks]).tolist() == [3, 1, 2, 3, 0]
    assert join_groups([marks, films]).tolist() == [3, 1, 1, 3, 0]
    assert join_groups([marks, films, np.array([0, 1, 2, 3, 1])]).tolist() == [3, 0, 0, 3, 0]
    assert join_groups([films], ([1, 4], [2, 3])).tolist() == [1, 0, 0, 2, 2]
    assert join_groups([np.empty(0, int)] * 2).tolist() == []


def test_a_set_without_them_has_no_line(faces: ShardSet) -> None:
    assert describe_duplicates(faces) == []


def test_across_splits_within_one_and_under_two_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of val's six images are in train too; one of train's stands there three times."""
    source = tree(tmp_path / "source")
    for k in range(2):
        shutil.copy(source / "val/happy" / f"{k}.jpg", source / "train/happy" / f"leak{k}.jpg")
    for name in ("again", "third"):
        shutil.copy(source / "train/angry/5.jpg", source / "train/angry" / f"{name}.jpg")
    shutil.copy(source / "val/angry/0.jpg", source / "val/happy/other.jpg")
    words = ["folder", "--source", str(source), "--out", str(tmp_path / "out"), "--size", "24"]
    assert pack.main([*words, "--workers", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "duplicates" in line]
    assert lines == [
        "duplicates, val and train: 2 of the 7 images of val are also in train "
        "(train/happy_leak0 = val/happy_0, train/happy_leak1 = val/happy_1)",
        "duplicates, train: 2 beside the first of each image (train/angry_5 = train/angry_again)",
        "duplicates, val: 1 beside the first of each image (val/angry_0 = val/happy_other)",
        "duplicates, labels: 1 with more than one label (val/angry_0 (angry) = val/happy_other "
        "(happy))",
    ]
    assert verify.main([str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-2] == lines and printed[-2].startswith("leaks: 2 of 7 images of val")
    assert printed[-1].endswith("each whole; duplicates and leaks stand above")


def test_one_checksum_of_two_images_is_no_duplicate(tmp_path: Path) -> None:
    """Checksums of 32 bits meet by chance: the bytes decide."""
    root = packed(tree(tmp_path / "source"), tmp_path / "out")
    for split in ("train", "val"):
        index = np.load(root / f"index-{split}.npy")
        index["crc32"], index["size"] = 7, index["size"].min()
        replace_index(root, index, split)
    assert describe_duplicates(open_shardset(root)) == []
