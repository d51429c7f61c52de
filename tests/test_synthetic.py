"""The drawn faces: reproducible, balanced as AffectNet is, different where they should be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import synthetic
from shards.faces import CLASSES, face


def pixels(*arguments: int, **options: int) -> np.ndarray:
    return np.asarray(face(*arguments, size=48, **options)).astype(int)


def test_a_face_is_a_function_of_seed_index_and_label() -> None:
    first = pixels(0, 5, 1)
    assert first.shape == (48, 48, 3) and (first == pixels(0, 5, 1)).all()
    for other in (pixels(1, 5, 1), pixels(0, 6, 1), pixels(0, 5, 2)):
        assert (first != other).mean() > 0.01


def test_the_expression_changes_several_regions_and_little_else() -> None:
    """Same person, pose and light: brows, eyes and mouth differ, the background does not."""
    neutral, surprise = pixels(0, 11, 0), pixels(0, 11, CLASSES.index("surprise"))
    changed = (neutral != surprise).any(axis=2)
    assert 0.03 < changed.mean() < 0.5
    assert changed[10:24].any() and changed[28:44].any()


def test_an_identity_stays_a_person_over_indices() -> None:
    same = [pixels(0, i, 0, identity=3)[24, 24] for i in range(6)]
    strangers = [pixels(0, i, 0, identity=i)[24, 24] for i in range(6)]
    assert np.std(same, axis=0).mean() < np.std(strangers, axis=0).mean()


@pytest.mark.parametrize("count", [8, 100, 4000])
def test_training_labels_follow_affectnet(count: int) -> None:
    labels = synthetic.train_labels(count)
    per_class = np.bincount(labels, minlength=8)
    assert len(labels) == count and (per_class >= 1).all() and labels == sorted(labels)
    expected = np.array(synthetic.AFFECTNET_TRAIN) / sum(synthetic.AFFECTNET_TRAIN) * count
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


def test_contact_sheet(tmp_path: Path) -> None:
    synthetic.contact_sheet(tmp_path / "sheet.png", size=32, seed=0, columns=3)
    assert Image.open(tmp_path / "sheet.png").size == (110 + 3 * 32, 8 * 32)
