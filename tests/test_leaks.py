"""Photographs that stand in two splits in other forms, found and left out."""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from planted import altered
from scipy.ndimage import gaussian_filter
from trees import digests

from shards import pack, verify
from shards.format import open_shardset
from shards.likeness import likenesses, same_photographs


def scene(number: int, size: int = 96) -> Image.Image:
    """A picture with structure of many sizes, another one for each number."""
    rng = np.random.default_rng(number)
    layers = [gaussian_filter(rng.random((size, size, 3)), (s, s, 0)) * s for s in (1.5, 3, 8, 18)]
    total = np.sum(layers, axis=0)
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def test_altered_photographs_are_found_and_others_are_not() -> None:
    dice = random.Random(0)
    originals = likenesses(scene(k) for k in range(60))
    copies = likenesses(altered(scene(k), dice) for k in range(40))
    pairs = same_photographs(originals, copies)
    found = set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    assert found <= {(k, k) for k in range(40)} and len(found) >= 38
    assert len(same_photographs(originals, likenesses(scene(k) for k in range(200, 240))).a) == 0


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_pictures_are_no_photographs_of_each_other(level: int) -> None:
    flat = likenesses([Image.new("RGB", (64, 64), (level,) * 3)] * 20)
    assert len(same_photographs(flat, flat).a) == 0
    assert len(same_photographs(flat, likenesses([])).b) == 0


def release(root: Path) -> Path:
    """Two classes, eight training pictures each; val repeats three, one under another label."""
    for label, name in enumerate(("left", "right")):
        for k in range(8):
            save(scene(10 * label + k), root / "train" / name / f"{k}.png")
        for k in range(4):
            save(scene(1000 + 10 * label + k), root / "val" / name / f"{k}.png")
    for name, source in (("left/again.png", 3), ("left/torn.png", 14), ("right/again.png", 12)):
        save(ImageOps.mirror(scene(source)).resize((70, 70)), root / "val" / name)
    return root


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def test_a_pack_and_verify_name_leaks_and_the_pack_drops_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "folder",
        "--source",
        str(release(tmp_path / "faces")),
        "--workers",
        "1",
        "--size",
        "96",
    ]
    assert pack.main([*words, "--out", str(tmp_path / "all")]) == 0
    line = "leaks: 3 of 11 images of val show photographs of train (2 left, 1 right); 1 of 3 pairs"
    assert line in capsys.readouterr().out
    assert (
        verify.main([str(tmp_path / "all"), "--workers", "1", "--leaks", str(tmp_path / "l")]) == 0
    )
    printed = capsys.readouterr().out
    assert line in printed and "train/left_3 = val/left_again" in printed
    with (tmp_path / "l" / "leaks.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert sorted((r["label"], r["label there"]) for r in rows) == [
        ("left", "left"), ("left", "right"), ("right", "right")
    ]  # fmt: skip
    assert Image.open(tmp_path / "l" / "leaks.png").size[0] > 1000

    assert pack.main([*words, "--out", str(tmp_path / "clean"), "--drop-leaks"]) == 0
    assert "leaks:" not in capsys.readouterr().out
    clean = open_shardset(tmp_path / "clean")
    assert sum(clean.counts["train"]) == 13 and sum(clean.counts["val"]) == 11
    assert clean.dropped == {"shows a photograph of val": 3}


def test_leaks_between_two_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["folder", "--workers", "1", "--size", "96"]
    assert (
        pack.main([*words, "--source", str(release(tmp_path / "a")), "--out", str(tmp_path / "A")])
        == 0
    )
    for split, k in (("train", 5), ("val", 2000)):
        save(altered(scene(k), random.Random(k)), tmp_path / "b" / split / "left" / "x.png")
    assert pack.main([*words, "--source", str(tmp_path / "b"), "--out", str(tmp_path / "B")]) == 0
    capsys.readouterr()
    assert (
        verify.main([str(tmp_path / "A"), "--workers", "1", "--against", str(tmp_path / "B")]) == 0
    )
    printed = capsys.readouterr().out
    assert f"leaks: 1 of 1 images of {tmp_path / 'B'}/train show photographs of train" in printed
    assert "/val show" not in printed


def test_verify_says_why_it_compared_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["folder", "--workers", "1", "--size", "96", "--source", str(release(tmp_path / "a"))]
    assert pack.main([*words, "--out", str(tmp_path / "A")]) == 0
    (tmp_path / "A" / "other").touch()
    wanted = [str(tmp_path / "A"), "--workers", "1", "--leaks", str(tmp_path / "l")]
    assert verify.main([*wanted, "--against", str(tmp_path / "A")]) == 1
    reason = "--leaks and --against: no photographs were compared, as there are faults"
    assert reason in capsys.readouterr().out and not (tmp_path / "l").exists()


def near(root: Path) -> Path:
    """48 px faces of one class, and in val copies of them from near to past the limit of a leak.

    Two pictures of a single value, of the same bytes, stand in both splits.
    """
    rng = np.random.default_rng(5)
    for k in range(160):
        original = np.asarray(scene(k, 48).convert("L"), float)
        save(Image.fromarray(original.astype(np.uint8)), root / "train" / "face" / f"{k}.png")
        noise = gaussian_filter(rng.standard_normal((48, 48)), 1.5) * (25 + k / 8)
        copy = np.clip(original + noise, 0, 255).astype(np.uint8)
        save(Image.fromarray(copy), root / "val" / "face" / f"{k}.png")
    for split in ("train", "val"):
        save(Image.new("L", (48, 48), 7), root / split / "face" / "flat.png")
    return root


def test_nothing_is_found_where_leaks_were_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies about the limit: what the pack compares are the pixels that verify will see."""
    words = ["folder", "--source", str(near(tmp_path / "faces")), "--workers", "1"]
    assert pack.main([*words, "--out", str(tmp_path / "out"), "--drop-leaks"]) == 0
    dropped = open_shardset(tmp_path / "out").dropped["shows a photograph of val"]
    assert 40 < dropped < 140
    assert verify.main([str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "leaks:" not in printed and "duplicates, val and train" not in printed
    assert "all as they should be" in printed


def test_groups_are_recorded_and_verify_decodes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies of copies are of one group, across splits too, with any number of workers."""
    root = release(tmp_path / "faces")
    dice = random.Random(3)
    for k in range(3):
        save(altered(scene(1), dice).convert("RGB"), root / "train" / "right" / f"again{k}.png")
    words = ["folder", "--source", str(root), "--size", "96", "--shard-size", "5"]
    for workers in (1, 2):
        out = str(tmp_path / f"out{workers}")
        assert pack.main([*words, "--out", out, "--workers", str(workers)]) == 0
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2")
    shards = open_shardset(tmp_path / "out1")
    together: dict[int, set[str]] = {}
    for split in map(shards.split, shards.splits):
        for sample, group in enumerate(split.index["group"].tolist()):
            together.setdefault(group, set()).add(split.name_of(sample))
    assert sorted(sorted(own) for own in together.values() if len(own) > 1) == [
        ["train/left_1", "train/right_again0", "train/right_again1", "train/right_again2"],
        ["train/left_3", "val/left_again"],
        ["train/right_2", "val/right_again"],
        ["train/right_4", "val/left_torn"],
    ]
    decoded = []
    plain = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(1) or plain(*a, **k)
    )
    monkeypatch.setattr(JpegImageFile, "load", lambda self: pytest.fail("decoded once more"))
    assert verify.main([out, "--workers", "1"]) == 0
    assert "leaks: 3 of 11" in capsys.readouterr().out and len(decoded) == 19 + 11


def test_two_names_for_one_class_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("happy", "Happiness", "sad"):
        save(scene(1), tmp_path / "faces" / "train" / name / "1.png")
    words = ["folder", "--source", str(tmp_path / "faces"), "--out", str(tmp_path / "out")]
    assert pack.main(words) == 2
    line = "error: folder: classes 'Happiness' and 'happy' are two names for one class; "
    assert line in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert pack.main([*words, "--skip", "happy", "--workers", "1"]) == 0


def test_leaks_cannot_be_dropped_where_there_is_one_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(scene(1), tmp_path / "faces" / "train" / "left" / "1.png")
    words = ["folder", "--source", str(tmp_path / "faces"), "--out", str(tmp_path / "out")]
    assert pack.main([*words, "--drop-leaks"]) == 2
    assert "--drop-leaks needs 'train' and another split, found train" in capsys.readouterr().err
