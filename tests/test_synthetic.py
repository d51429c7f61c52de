"""The drawn faces: reproducible, balanced as AffectNet is, different where they should be."""

import csv
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from shards.releases import folder, synthetic
from shards.releases.affectnet import CLASSES, TRAIN
from shards.releases.drawing.action_units import ACTIONS
from shards.releases.drawing.face import draw_face


def pixels(*arguments: int, **options: int) -> np.ndarray:
    return np.asarray(draw_face(*arguments, size=48, **options)).astype(int)


def test_a_face_is_a_function_of_seed_index_and_label() -> None:
    first = pixels(0, 5, 1)
    assert first.shape == (48, 48, 3) and (first == pixels(0, 5, 1)).all()
    for other in (pixels(1, 5, 1), pixels(0, 6, 1), pixels(0, 5, 2)):
        assert (first != other).mean() > 0.01


def test_each_class_has_its_action_units() -> None:
    assert tuple(ACTIONS) == CLASSES


def test_the_expression_changes_several_regions_and_little_else() -> None:
    """Same person, pose and light: brows, eyes and mouth differ, the background does not."""
    neutral, surprise = pixels(0, 11, 0), pixels(0, 11, CLASSES.index("surprise"))
    changed = (neutral != surprise).any(axis=2)
    assert 0.03 < changed.mean() < 0.5
    assert changed[10:24].any() and changed[28:44].any()


def test_a_person_stays_the_same_over_indices() -> None:
    same = [pixels(0, i, 0, person=3)[24, 24] for i in range(6)]
    strangers = [pixels(0, i, 0, person=i)[24, 24] for i in range(6)]
    assert np.std(same, axis=0).mean() < np.std(strangers, axis=0).mean()


@pytest.mark.parametrize("count", [8, 100, 4000])
def test_training_labels_follow_affectnet(count: int) -> None:
    labels = synthetic.train_labels(count)
    per_class = np.bincount(labels, minlength=8)
    assert len(labels) == count and (per_class >= 1).all() and labels == sorted(labels)
    expected = np.array(TRAIN) / sum(TRAIN) * count
    assert (np.abs(per_class - expected) <= 4).all()


def test_validation_is_balanced_and_shares_no_face_with_training() -> None:
    release = synthetic.release(50, 16, size=32, seed=0)
    train, val = release.splits["train"], release.splits["val"]
    assert np.bincount([item.label for item in val]).tolist() == [2] * 8
    assert not {i.source[1] for i in train} & {i.source[1] for i in val}


@pytest.mark.parametrize(
    ("train", "val", "size"), [(50, 15, 32), (50, 0, 32), (5, 8, 32), (50, 8, 4)]
)
def test_impossible_requests_are_refused(train: int, val: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"--train|--val|--size"):
        synthetic.release(train, val, size=size, seed=0)


def test_layouts_are_those_of_the_releases(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path / "tree", {"train": 16, "val": 8}, size=32, seed=0)
    packed = folder.release(tmp_path / "tree")
    assert packed.class_names == tuple(sorted(CLASSES))
    assert {name: len(items) for name, items in packed.splits.items()} == {"train": 16, "val": 8}

    layouts.write_affectnet_reduced(tmp_path / "reduced", 16, 8, size=32, seed=0)
    notes = tmp_path / "reduced" / "val_set" / "annotations"
    labels = [int(np.load(p, allow_pickle=False)) for p in sorted(notes.glob("*_exp.npy"))]
    assert sorted(labels) == list(range(8)) and len(list(notes.iterdir())) == 4 * 8
    images = sorted((tmp_path / "reduced" / "val_set" / "images").iterdir())
    assert {p.stem for p in images} == {p.name.split("_")[0] for p in notes.iterdir()}

    layouts.write_affectnet_full(tmp_path / "full", 16, 8, size=32, seed=0)
    rows = list(csv.DictReader((tmp_path / "full" / "training.csv").open()))
    assert len(rows) == 16 and {int(r["expression"]) for r in rows} == set(range(8))
    row = rows[5]
    photo = Image.open(tmp_path / "full/Manually_Annotated_Images" / row["subDirectory_filePath"])
    x, y, w = (int(row[k]) for k in ("face_x", "face_y", "face_width"))
    crop = np.asarray(photo.crop((x, y, x + w, y + w))).astype(int)
    drawn = np.asarray(draw_face(0, 5, int(row["expression"]), size=32)).astype(int)
    assert np.abs(crop - drawn).mean() < 8  # JPEG noise

    layouts.write_rafdb(tmp_path / "raf", 14, 7, seed=0)
    lines = (tmp_path / "raf/EmoLabel/list_patition_label.txt").read_text().split("\n")
    assert lines[0] == "train_00001.jpg 1" and lines[-1] == "test_0007.jpg 7" and len(lines) == 21
    assert Image.open(tmp_path / "raf/Image/aligned/train_00001_aligned.jpg").size == (100, 100)

    layouts.write_sfew(tmp_path / "sfew", 7, 7, seed=0)
    layouts.write_sfew(tmp_path / "raw", 7, 7, seed=0, aligned=False)
    assert len(list((tmp_path / "sfew").glob("Train/Train_Aligned_Faces/Angry/*.png"))) == 1
    assert len(list((tmp_path / "raw").glob("Val/Surprise/*.png"))) == 1
