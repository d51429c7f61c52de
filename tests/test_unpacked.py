"""Releases as their archives unpack and as they circulate: every part is found by itself."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
from packs import pack_here, refused
from trees import encoded, picture, tree

from shards.format import open_shardset
from shards.packing.writer import pack
from shards.release import Release
from shards.releases import affectnet, folder, rafdb, sfew
from shards.releases.source import Source

PHOTOS = "Manually_Annotated_Images"


def counts(release: Release) -> dict[str, int]:
    return {split: len(items) for split, items in release.splits.items()}


def moved(source: Path, root: Path, places: dict[str, str]) -> Path:
    """A copy of a release whose parts lie elsewhere; an empty place is left out."""
    for name, place in places.items():
        if place:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (source / name).is_dir() else shutil.copy)(
                source / name, root / place
            )
    return root


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full") / "full"
    layouts.write_affectnet_full(root, 16, 8, size=16, seed=0)
    return root


@pytest.fixture(scope="module")
def raf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raf") / "basic"
    layouts.write_rafdb(root, 14, 7, seed=0, size=16)
    return root


@pytest.mark.parametrize(
    "places",
    [
        {"training.csv": "L/training.csv", "validation.csv": "L/validation.csv", PHOTOS: PHOTOS},
        {"training.csv": "a/Training.csv", "validation.csv": "b/validation.csv",
         PHOTOS: f"deep/er/{PHOTOS}/{PHOTOS.lower()}"},
        {"training.csv": "one/two/Manually_Annotated/training.csv",
         "validation.csv": "one/two/Manually_Annotated/validation.csv",
         PHOTOS: f"one/Manually_Annotated_compressed/Manually_Annotated/{PHOTOS}"},
    ],
)  # fmt: skip
def test_affectnets_lists_and_photographs_lie_anywhere(
    full: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    release = affectnet.release(moved(full, tmp_path / "r", places), size=None, margin=0.0)
    assert counts(release) == {"train": 16, "val": 8} and not release.left_out.counts
    assert release.read(release.splits["val"][-1]).meta


def test_affectnets_crops_lie_one_folder_too_deep_and_doubled(tmp_path: Path) -> None:
    layouts.write_affectnet_reduced(tmp_path / "flat", 16, 8, size=16, seed=0)
    places = {"train_set": "AffectNet/train_set/train_set", "val_set": "x/Validation_Set"}
    root = moved(tmp_path / "flat", tmp_path / "r", places)
    release = affectnet.release(root, size=32, margin=0.0)
    assert counts(release) == {"train": 16, "val": 8}
    meta = release.read(release.splits["train"][3]).meta
    assert meta and meta["landmarks"][-1] == 32.0


def test_a_part_that_is_there_twice_is_not_chosen_in_silence(full: Path, tmp_path: Path) -> None:
    root = shutil.copytree(full, tmp_path / "r")
    shutil.copytree(full, root / "again")
    with pytest.raises(ValueError, match="two of one name; give --source the folder"):
        affectnet.release(root, size=None, margin=0.0)
    shutil.rmtree(root / "again" / PHOTOS)  # an equal list does no harm
    assert counts(affectnet.release(root, size=None, margin=0.0))["train"] == 16


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["Automatically_Annotated/Automatically_Annotated_Images/1/"], "automatically annotated"),
        (["lists/automatically_annotated.csv"], "is not packed: nobody has looked at its labels"),
        (["Manually_Annotated.part1.rar"], "unpack Manually_Annotated.part1.rar"),
        (["readme.txt"], "it holds readme.txt"),
    ],
)
def test_what_is_not_taken_of_affectnet_is_named(
    tmp_path: Path, names: list[str], error: str
) -> None:
    for name in names:
        (tmp_path / "r" / name).parent.mkdir(parents=True)
        (tmp_path / "r" / name).mkdir() if name.endswith("/") else (tmp_path / "r" / name).touch()
    assert error in refused(tmp_path / "r", "affectnet")


@pytest.mark.parametrize("is_beside", [True, False])
def test_affectnet_plus(tmp_path: Path, is_beside: bool) -> None:
    layouts.write_affectnet_plus(tmp_path / "plus", 16, 8, size=32, seed=0, is_beside=is_beside)
    code, output = pack_here("affectnet", "--source", tmp_path / "plus", "--out",
                             tmp_path / "out", "--size", "32", "--workers", "1")  # fmt: skip
    assert code == 0 and "AffectNet, AffectNet+" in output
    shards = open_shardset(tmp_path / "out")
    assert shards.dataset == "AffectNet-8" and shards.release == "AffectNet+, human labels"
    split = shards.split("train")
    assert split.index["soft"].argmax(axis=1).tolist() == split.index["label"].tolist()
    assert split.index["soft"].max() == pytest.approx(0.86)
    release = affectnet.release(tmp_path / "plus", classes=7, size=None, margin=0.0)
    content = release.read(release.splits["train"][0])
    assert content.meta and content.soft and len(content.soft) == 7
    assert content.meta["soft_label"]["contempt"] == 0.02 and content.meta["subset"] in (0, 1, 2)
    assert content.meta["human_label"] == release.class_names[release.splits["train"][0].label]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"Soft-Label": [0] * 8}, "sum to nothing"),
        ({"Soft-Label": [0.5] * 7}, "expected 8 numbers"),
        ({"Soft-Label": [-1] + [1] * 7}, "expected numbers of 0 or more"),
        ({"Soft-Label": ["1"] * 8}, "expected numbers of 0 or more"),
    ],
)
def test_soft_labels_that_are_none(tmp_path: Path, change: dict, error: str) -> None:
    root = tmp_path / "plus"
    layouts.write_affectnet_plus(root, 16, 8, size=16, seed=0, is_beside=True)
    release = affectnet.release(root, size=None, margin=0.0)
    item = release.splits["train"][0]
    path = root / item.source[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=error):
        release.read(item)


@pytest.mark.parametrize(
    "places",
    [
        {"EmoLabel": "EmoLabel", "Image": "Image/aligned"},  # as aligned.zip unpacks within it
        {"EmoLabel": "RAF/basic/EmoLabel", "Image": "RAF/basic/Image"},
        {"EmoLabel": "basic/EmoLabel", "Image/aligned": "pictures/Aligned"},
    ],
)
def test_raf_dbs_list_and_images(raf: Path, tmp_path: Path, places: dict[str, str]) -> None:
    release = rafdb.release(moved(raf, tmp_path / "r", places))
    assert counts(release) == {"train": 14, "test": 7} and not release.left_out.counts
    assert release.read(release.splits["test"][0]).image


@pytest.mark.parametrize("home", ["", "DATASET/", "a/b/"])
def test_raf_db_in_numbered_folders(raf: Path, tmp_path: Path, home: str) -> None:
    listed = rafdb.release(raf)
    for line in (raf / "EmoLabel" / "list_patition_label.txt").read_text().splitlines():
        name, label = line.split()
        target = tmp_path / "r" / home / name.split("_")[0].capitalize() / label
        target.mkdir(parents=True, exist_ok=True)
        aligned = name.replace(".jpg", "_aligned.jpg")
        shutil.copy(raf / "Image" / "aligned" / aligned, target / aligned)
    release = rafdb.release(tmp_path / "r")
    for split in ("train", "test"):
        own, other = (sorted((item.key, item.label) for item in found.splits[split])
                      for found in (release, listed))  # fmt: skip
        assert own == other
    (target.parent / "8").mkdir()
    with pytest.raises(ValueError, match="8: expected folders 1 to 7"):
        rafdb.release(tmp_path / "r")


def test_raf_dbs_whole_photographs_are_not_taken(raf: Path, tmp_path: Path) -> None:
    root = moved(raf, tmp_path / "r", {"EmoLabel": "EmoLabel", "Image/aligned": "Image/original"})
    assert "holds whole photographs, which are not packed" in refused(root, "rafdb")


def test_raf_dbs_compound_set_is_a_release_of_its_own(raf: Path, tmp_path: Path) -> None:
    root = shutil.copytree(raf, tmp_path / "r" / "basic").parent
    layouts.write_rafdb(root / "compound", 22, 11, seed=1, size=16, classes=11)
    release = rafdb.release(root, compound=True)
    assert release.dataset == "RAF-DB compound" and len(release.class_names) == 11
    assert counts(release) == {"train": 22, "test": 11}
    assert counts(rafdb.release(root)) == {"train": 14, "test": 7}
    error = refused(root / "compound" / "EmoLabel", "rafdb")
    assert "aligned not found" in error
    (root / "compound").rename(tmp_path / "other")
    assert "is packed as rafdb-compound" in refused(tmp_path / "other", "rafdb")


@pytest.mark.parametrize("home", ["", "SFEW/"])
def test_sfews_two_archives_side_by_side(tmp_path: Path, home: str) -> None:
    layouts.write_sfew(tmp_path / "whole", 7, 7, seed=0, size=16)
    root = moved(tmp_path / "whole", tmp_path / "r", {
        "Train/Train_Aligned_Faces": f"{home}Train_Aligned_Faces/Train_Aligned_Faces",
        "Val/Val_Aligned_Faces": f"{home}Val_Aligned_Faces_new",
    })  # fmt: skip
    release = sfew.release(root, landmarks=None, size=16)
    whole = sfew.release(tmp_path / "whole", landmarks=None, size=16)
    for split in ("train", "val"):
        own, other = ([(item.key, item.label) for item in found.splits[split]]
                      for found in (release, whole))  # fmt: skip
        assert own == other and len(own) == 7


def rename(root: Path, *names: tuple[str, str]) -> Path:
    for old, new in names:
        (root / old).rename(root / new)
    return root


CHANGES: dict[str, Callable[[Path], object]] = {
    "case of splits": lambda root: rename(root, ("train", "TRAIN"), ("val", "Val")),
    "case of classes": lambda root: rename(root, ("val/happy", "val/Happy")),
    "too deep": lambda root: rename(root, ("train", "x"), ("val", "y")) and [
        (root / "set").mkdir(), rename(root, ("x", "set/Train"), ("y", "set/val"))],
    "doubled": lambda root: rename(root, ("train", "x")) and [
        (root / "train").mkdir(), rename(root, ("x", "train/train"))],
    "litter beside": lambda root: [(root / "__MACOSX" / "train").mkdir(parents=True),
                                   (root / "readme.md").touch()],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_tree_is_the_same_however_it_was_copied(tmp_path: Path, change: str) -> None:
    root = tree(tmp_path / "source", train=3, val=2)
    plain = folder.release(root)
    CHANGES[change](root)
    found = folder.release(root)
    assert found.class_names == plain.class_names and set(found.splits) == {"train", "val"}
    for split, items in plain.splits.items():
        assert [i[:2] for i in found.splits[split]] == [i[:2] for i in items]
    assert found.read(found.splits["val"][0]) == plain.read(found.splits["val"][0])


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    root, name = tree(tmp_path / "source", train=2, val=2), "dégoût"
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    rename(root, ("train/angry", f"train/{decomposed}"), ("val/angry", f"val/{composed}"))
    release = folder.release(root)
    assert release.class_names[0] == composed and counts(release) == {"train": 4, "val": 4}
    pack(release, tmp_path / "out", size=24, workers=1, progress=False)
    (root / "train" / composed.upper()).mkdir()
    with pytest.raises(ValueError, match="one name but for case or Unicode form; merge them"):
        folder.release(root)


def test_side_folders_are_skipped_by_name_and_counted(tmp_path: Path) -> None:
    root = tree(tmp_path / "source", train=3, val=2)
    shutil.copytree(root / "train", root / "unlabeled" / "faces")
    assert "--skip unlabeled passes a side folder over" in refused(root, "folder")
    (root / "train" / "more").mkdir()
    (root / "train" / "more" / "1.jpg").touch()
    release = folder.release(root, skip=["Unlabeled", "train/more/"])
    assert counts(release) == {"train": 6, "val": 4}
    assert release.left_out.counts == {"in a folder that --skip names": 7}
    with pytest.raises(ValueError, match="--skip mor: no such folder"):
        folder.release(root, skip=["unlabeled", "mor"])


def linked(root: Path, master: Path) -> Path:
    """A tree of links to the files of another."""
    for file in sorted(master.rglob("*.jpg")):
        link = root / file.relative_to(master)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))
    return root


def test_links_are_followed_into_the_folder_that_is_named(tmp_path: Path) -> None:
    master = tree(tmp_path / "blobs", train=3, val=2)
    root = linked(tmp_path / "snapshot", master)
    (tmp_path / "elsewhere.jpg").write_bytes(encoded(picture(1), "JPEG"))
    (root / "train" / "happy" / "z.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    out = tmp_path / "out"
    options = ("folder", "--source", root, "--size", "24", "--workers", "1", "--out", out)
    code, output = pack_here(*options)
    assert code == 2 and "11 links lead out of" in output and "--follow-links FOLDER" in output
    code, output = pack_here(*options, "--follow-links", master)
    assert code == 0, output
    shards = open_shardset(out)
    assert shards.counts == {"train": (3, 3), "val": (2, 2)}
    assert shards.dropped == {"a link that leads out of the source": 1}
    code, output = pack_here(*options, "--follow-links", tmp_path / "none")
    assert code == 2 and "--follow-links" in output and "none not found" in output


def test_a_releases_linked_folder_is_followed(full: Path, tmp_path: Path) -> None:
    root = moved(full, tmp_path / "r", {"training.csv": "training.csv",
                                        "validation.csv": "validation.csv"})  # fmt: skip
    (root / PHOTOS).symlink_to(full / PHOTOS)
    release = affectnet.release(Source(root, full), size=None, margin=0.0)
    assert counts(release) == {"train": 16, "val": 8}
    assert release.read(release.splits["train"][0]).image
    with pytest.raises(ValueError, match="--follow-links FOLDER follows links into FOLDER"):
        affectnet.release(root, size=None, margin=0.0)


def test_parts_lie_below_linked_folders_too(tmp_path: Path) -> None:
    """Links that lead round, or to a folder a second time, change nothing."""
    store, root = tmp_path / "store", tmp_path / "r"
    layouts.write_affectnet_plus(tmp_path / "plus", 16, 8, size=16, seed=0, is_beside=False)
    moved(
        tmp_path / "plus",
        store,
        {"train_set": "a/b/train_set/train_set", "validation_set": "val_set"},
    )
    notes = store / "a/b/train_set/train_set/annotations"
    notes.rename(tmp_path / "store" / "notes")
    notes.symlink_to(store / "notes")
    (store / "a" / "round").symlink_to(store)
    root.mkdir()
    for name in ("one", "two"):
        (root / name).symlink_to(store / "a")
    (root / "val_set").symlink_to(store / "val_set")
    release = affectnet.release(Source(root, store), size=None, margin=0.0)
    assert release.release == "AffectNet+, human labels" and not release.left_out.counts
    assert counts(release) == {"train": 16, "val": 8}
    assert release.read(release.splits["train"][5]).soft
    with pytest.raises(FileNotFoundError, match="holds no AffectNet release"):
        affectnet.release(Source(root), size=None, margin=0.0)


def test_a_tree_lies_below_a_linked_folder(tmp_path: Path) -> None:
    plain, root = tree(tmp_path / "store" / "set" / "faces", train=3, val=2), tmp_path / "r"
    root.mkdir()
    (root / "all").symlink_to(tmp_path / "store")
    found = folder.release(Source(root, tmp_path / "store"))
    assert counts(found) == counts(folder.release(plain))
