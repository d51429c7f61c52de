"""A release is the same however a copy spells its names, and however deep its folders lie."""

import shutil
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import trees
from packs import refused
from test_unpacked import counts, moved

from shards.releases import affectnet, expw, folder, rafdb
from shards.releases.layout import Names


def renamed(root: Path, change: Callable[[str], str], pattern: str = "*.*") -> Path:
    """The tree with each file's name changed, as a copy through another system does."""
    for path in [*root.rglob(pattern)]:
        path.rename(path.with_name(change(path.name)))
    return root


@pytest.mark.parametrize("change", ["suffixes", "capitals", "slashes"])
def test_lists_name_files_in_another_spelling(tmp_path: Path, change: str) -> None:
    layouts.write_affectnet_full(tmp_path / "full", 16, 8, size=16, seed=0)
    root = shutil.copytree(tmp_path / "full", tmp_path / "r")
    plain = affectnet.release(tmp_path / "full", size=None, margin=0.0)
    if change == "slashes":
        for path in root.glob("*.csv"):
            path.write_text(path.read_text().replace("/0", "\\0"))
    else:
        renamed(root, lambda n: n.replace("jpg", "JPG") if change == "suffixes" else n.upper())
    found = affectnet.release(root, size=None, margin=0.0)
    assert counts(found) == {"train": 16, "val": 8} and not found.left_out.counts
    keys = [[item.key for item in r.splits["train"]] for r in (found, plain)]
    assert keys[0] == keys[1]
    assert found.read(found.splits["val"][-1]).meta == plain.read(plain.splits["val"][-1]).meta


def test_a_file_that_is_spelt_as_the_list_comes_first(tmp_path: Path) -> None:
    names = Names(["a/B.jpg", "A/b.JPG", "ä.jpg", "c.jpg"])
    assert [names.find(n) for n in ("a/B.jpg", "A/b.JPG", "C.JPG", "a\u0308.jpg", "d.jpg")] == [
        "a/B.jpg", "A/b.JPG", "c.jpg", "ä.jpg", None,
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["capitals", "doubled"])
def test_the_folders_of_crops_and_their_notes(tmp_path: Path, change: str) -> None:
    root = tmp_path / "r"
    layouts.write_affectnet_reduced(root, 16, 8, size=16, seed=0)
    for path in [p for split in ("train_set", "val_set") for p in (root / split).iterdir()]:
        if change == "capitals":
            path.rename(path.with_name(path.name.capitalize()))
        else:
            path.rename(root / "aside")
            path.mkdir()
            (root / "aside").rename(path / path.name)
    release = affectnet.release(root, size=16, margin=0.0)
    assert counts(release) == {"train": 16, "val": 8} and not release.left_out.counts
    assert release.read(release.splits["train"][0]).meta


@pytest.mark.parametrize("new", ["_aligned.JPG", ".jpg", "_ALIGNED.jpg"])
def test_raf_dbs_images_in_another_spelling(tmp_path: Path, new: str) -> None:
    layouts.write_rafdb(tmp_path / "r", 14, 7, seed=0, size=16)
    renamed(tmp_path / "r", lambda name: name.replace("_aligned.jpg", new), "*.jpg")
    release = rafdb.release(tmp_path / "r")
    assert counts(release) == {"train": 14, "test": 7} and not release.left_out.counts
    assert [item.key for item in release.splits["test"]][:2] == ["test_0001", "test_0002"]


def test_expws_photographs_below_the_archives_folder(tmp_path: Path) -> None:
    layouts.write_expw(tmp_path / "flat", 8, seed=0)
    places = {"label.lst": "label/label.lst", "origin": "image/origin"}
    root = moved(tmp_path / "flat", tmp_path / "r", places)
    (root / "image" / "origin.7z.001").touch()
    release = expw.release(renamed(root, str.upper, "*.jpg"), margin=0.0)
    assert counts(release) == {"train": 16} and not release.left_out.counts
    release.read(release.splits["train"][-1])


def test_class_folders_of_other_names_are_packed_as_what_is_named(tmp_path: Path) -> None:
    trees.tree(tmp_path / "r", train=1, val=1)
    (tmp_path / "r" / "train" / "happy").rename(tmp_path / "r" / "train" / "joyful")
    (tmp_path / "r" / "val").rename(tmp_path / "r" / "test")
    for dataset in ("fer2013", "rafdb"):
        assert refused(tmp_path / "r", dataset).endswith(
            "class folders of any names are packed as `folder`"
        )


def test_a_tree_lies_any_number_of_lone_folders_deep(tmp_path: Path) -> None:
    trees.tree(tmp_path / "r" / "archive" / "faces" / "dataset")
    assert counts(folder.release(tmp_path / "r")) == {"train": 18, "val": 6}
    (tmp_path / "r" / "archive" / "faces" / "readme.txt").touch()
    with pytest.raises(FileNotFoundError, match="it holds archive/"):
        folder.release(tmp_path / "r")
