"""RAF-DB, SFEW and identities at small size, packed by the documented commands."""

import csv
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
from packs import pack_command, refused, samples
from PIL import Image

from dan_dist.config import load_config
from shards.format import open_shardset
from shards.packing.writer import pack
from shards.release import Item
from shards.releases import affectnet, identities, rafdb, sfew
from shards.releases.drawing.face import draw_face
from shards.releases.similarity import TEMPLATE


def test_raf_db(tmp_path: Path) -> None:
    layouts.write_rafdb(tmp_path / "raf" / "basic", 21, 14, seed=0)
    shards, output = pack_command(tmp_path / "raf", "rafdb")
    assert shards.class_names == tuple(load_config("configs/rafdb.yaml").data.classes or ())
    assert shards.counts == {"train": (3,) * 7, "test": (2,) * 7} and shards.image_size == 224
    expected = dict(line.split() for line in
                    (tmp_path / "raf/basic/EmoLabel/list_patition_label.txt").open())  # fmt: skip
    for sample in samples(shards, "train") + samples(shards, "test"):
        key = sample["__key__"]
        assert int(sample["cls"]) == int(expected[f"{key}.jpg"]) - 1
        source = Image.open(tmp_path / f"raf/basic/Image/aligned/{key}_aligned.jpg")
        enlarged = source.resize((224, 224), Image.Resampling.BILINEAR)
        found = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
        assert np.abs(found - np.asarray(enlarged).astype(int)).mean() < 2
    assert "12271" in output and "3068" in output


def test_broken_raf_db_lists(tmp_path: Path) -> None:
    root = tmp_path / "raf"
    layouts.write_rafdb(root, 70, 70, seed=0)
    path = root / "EmoLabel" / "list_patition_label.txt"
    whole = path.read_text()
    for line in ("train_00099.jpg 8", "train_00099.jpg", "../x.jpg 1"):
        path.write_text(f"{whole}\n{line}")
        assert f"line 141: '{line}', expected <train|test>" in refused(root, "rafdb")
    path.write_text("\n".join([*whole.split("\n")[1:], "test_0070.jpg 1", "train_00099.jpg 1"]))
    shards, output = pack_command(root, "rafdb", "--size", "native")
    assert shards.dropped == {
        "listed twice": 1, "listed, but there is no image": 1, "not in the partition list": 1
    }  # fmt: skip
    assert "train_00001_aligned.jpg: not in the partition list" in output
    path.unlink()
    assert "list_patition_label.txt not found" in refused(root, "rafdb")


def test_a_list_at_the_top_opens_nothing_outside(tmp_path: Path) -> None:
    """The folder of RAF-DB that holds its list is the source itself."""
    layouts.write_rafdb(tmp_path / "raf", 14, 7, seed=0)
    source = tmp_path / "raf" / "Image"
    (tmp_path / "raf/EmoLabel/list_patition_label.txt").rename(source / "list_patition_label.txt")
    (tmp_path / "secret.jpg").write_bytes((source / "aligned/train_00001_aligned.jpg").read_bytes())
    (source / "aligned/train_00001_aligned.jpg").unlink()
    (source / "aligned/train_00001_aligned.jpg").symlink_to(tmp_path / "secret.jpg")
    found = rafdb.release(source)
    assert found.left_out.counts["a link that leads out of the source"] == 1
    assert next(item.key for item in found.splits["train"]) == "train_00002"
    assert not any(Path(item.source).is_absolute() or "Image" in item.source
                   for item in found.splits["test"])  # fmt: skip


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_list_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fer2013.csv")
    assert "fer2013.csv: no regular file" in refused(tmp_path, "fer2013")


def test_classes_have_the_names_that_the_faces_are_drawn_by() -> None:
    assert set(rafdb.CLASSES) - {"happiness", "sadness"} <= set(affectnet.CLASSES)


def test_sfews_aligned_faces(tmp_path: Path) -> None:
    layouts.write_sfew(tmp_path / "sfew", 14, 7, seed=0)
    (tmp_path / "sfew" / "Test").mkdir()  # its labels are withheld
    shards, _ = pack_command(tmp_path / "sfew", "sfew", "--size", "128")
    assert shards.class_names == tuple(load_config("configs/sfew.yaml").data.classes or ())
    assert shards.counts == {"train": (2,) * 7, "val": (1,) * 7}
    names = {p.stem: p.parent.name for p in (tmp_path / "sfew").rglob("*.png")}
    for sample in samples(shards, "train"):
        own = names[sample["__key__"].split("_", 1)[1]]
        assert sfew.CLASSES[own] == shards.class_names[int(sample["cls"])]


def test_sfews_frames_are_aligned_by_landmarks(tmp_path: Path) -> None:
    root = tmp_path / "frames"
    layouts.write_sfew(root, 14, 7, seed=0, aligned=False)
    assert "shards.align" in refused(root, "sfew")
    # Faces of 128 px turned by 90° and put at (40, 20) in a larger frame, landmarks with them.
    lines, faces = [], {}
    for path in sorted(root.rglob("*.png")):
        drawn = Image.open(path)
        frame = Image.new("RGB", (300, 200))
        frame.paste(drawn.transpose(Image.Transpose.ROTATE_90), (40, 20))
        frame.save(path)
        own = TEMPLATE * 128 / 112
        points = np.stack([40 + own[:, 1], 20 + 127 - own[:, 0]], axis=1)
        key = path.relative_to(root).as_posix()
        faces[f"{path.parent.name.lower()}_{path.stem}"] = drawn
        lines.append(",".join([key, *(f"{v:.3f}" for v in points.ravel())]))
    (tmp_path / "marks.csv").write_text("\n".join([",".join(sfew.LANDMARKS), *lines[1:]]))
    shards, output = pack_command(
        root, "sfew", "--size", "128", "--landmarks", tmp_path / "marks.csv"
    )
    assert shards.dropped == {"not in marks.csv: no face found": 1}
    assert lines[0].split(",")[0] in output
    for sample in samples(shards, "train"):
        found = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
        expected = np.asarray(faces[sample["__key__"]]).astype(int)
        assert np.abs(found - expected)[4:-4, 4:-4].mean() < 6  # half a pixel, and JPEG noise


@pytest.mark.parametrize(
    ("place", "dropped"),
    [
        (lambda points: points * 1.5, 0),  # over the frame's edge
        (lambda points: points + 5000, 1),
        (lambda points: points * 1e12, 1),
        (lambda points: points * np.nan, 1),
    ],
)
def test_landmarks_far_outside_a_frame_are_named(
    tmp_path: Path, place: Callable[[np.ndarray], np.ndarray], dropped: int
) -> None:
    root = tmp_path / "frames"
    layouts.write_sfew(root, 98, 7, seed=0, size=32, aligned=False)
    (root / "Train" / "Angry" / "Thumbs.db").write_bytes(b"no image")
    (root / "Train" / "Train_Aligned_Faces.zip").write_bytes(b"no folder")
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.png"))]
    points = [place(TEMPLATE / 3.5), *[TEMPLATE / 3.5] * (len(names) - 1)]
    marks = [[name, *own.ravel()] for name, own in zip(names, points, strict=True)]
    with (tmp_path / "marks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*marks, ["Train/Angry/none.png", *range(10)]])
    release = sfew.release(root, landmarks=tmp_path / "marks.csv", size=32)
    pack(release, tmp_path / "out", size=32, workers=1, progress=False)
    expected = {"landmarks, but there is no image": 1} | ({"unreadable": 1} if dropped else {})
    assert open_shardset(tmp_path / "out").dropped == expected


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["a.png,1,2,3"], "line 1: a.png: 3 numbers, expected 10"),
        (["a.png" + ",1" * 10, "a.png" + ",2" * 10], "line 2: a.png: named twice"),
        (["a.png" + ",x" * 10], "line 1: could not convert string to float: 'x'"),
        (["a.png" + ",1" * 10], "names none of the images"),
    ],
)
def test_bad_landmark_files(tmp_path: Path, lines: list[str], error: str) -> None:
    layouts.write_sfew(tmp_path / "frames", 7, 7, seed=0, aligned=False)
    (tmp_path / "marks.csv").write_text("\n".join(lines))
    assert error in refused(tmp_path / "frames", "sfew", "--landmarks", tmp_path / "marks.csv")


def test_unknown_classes_and_missing_folders_of_sfew(tmp_path: Path) -> None:
    layouts.write_sfew(tmp_path / "sfew", 7, 7, seed=0)
    (tmp_path / "sfew/Train/Train_Aligned_Faces/Bored").mkdir()
    assert "Bored: expected one of Angry" in refused(tmp_path / "sfew", "sfew")
    shutil.rmtree(tmp_path / "sfew" / "Val")
    assert "Val not found" in refused(tmp_path / "sfew", "sfew")


def test_identities(tmp_path: Path) -> None:
    root = tmp_path / "people"
    for identity in range(30):
        (root / f"m.{identity:03d}").mkdir(parents=True)
        for k in range(1 + identity % 4):
            image = draw_face(0, 10 * identity + k, 0, size=32, person=identity)
            image.save(root / f"m.{identity:03d}" / f"{k}-Face.jpg", quality=95)
    (root / "m.empty").mkdir()
    (root / "m.000" / "more").mkdir()
    shutil.copy(root / "m.000" / "0-Face.jpg", root / "m.000" / "more" / "0.jpg")
    shards, _ = pack_command(
        root, "identities", "--size", "32", "--shard-size", "16", "--held-out", "3"
    )
    held = shards.class_names[27:]  # drawn; their labels follow
    trained = sorted({f"m.{k:03d}" for k in range(30)} - set(held))
    assert shards.class_names == (*trained, *sorted(held)) and len(held) == 3
    sizes = [1 + int(name[2:]) % 4 for name in shards.class_names]
    assert shards.counts == {"train": (*sizes[:27], 0, 0, 0), "val": (*[0] * 27, *sizes[27:])}
    assert shards.dropped == {
        "deeper than an identity's folder": 1, "an identity without images": 1
    }  # fmt: skip
    split = shards.split("train")
    assert all(shard.label is None for shard in split.shards)  # mixed
    assert len(set(split.index["label"][:16].tolist())) > 8
    for sample in [*samples(shards, "train"), *samples(shards, "val")]:
        label, k, name = sample["__key__"].split("_", 2)
        original = root / shards.class_names[int(label)] / f"{name}.jpg"
        assert int(sample["cls"]) == int(label) and int(k) < 4
        assert original.read_bytes() == sample["jpg"]
    out = tmp_path / "again"
    pack(identities.release(root, 3), out, size=32, workers=2, shard_size=16)
    for path in shards.root.glob("*.tar"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert set(identities.release(root).splits) == {"train"}  # too few for verification
    for identity in range(30, 250):
        (root / f"m.{identity:03d}").mkdir()
        (root / f"m.{identity:03d}" / "0.jpg").touch()
        if identity in (49, 249):
            assert (
                len(identities.release(root).splits["val"].identities) == 20 + (identity > 49) * 5
            )
    assert set(identities.release(root, 0).splits) == {"train"}
    for held_out in (-1, 250):
        with pytest.raises(ValueError, match=rf"--held-out {held_out}: .* holds 250 identities"):
            identities.release(root, held_out)


def test_the_list_of_identities_is_small_and_random_access(tmp_path: Path) -> None:
    images = identities.Images()
    for identity in range(2000):
        images.add(f"m.{identity}", [f"{k}-FaceId-0.jpg" for k in range(100)])
    assert len(images) == 200_000 and images[123_456] == list(images)[123_456]
    assert images[100] == Item("000001_00000_0-FaceId-0", 1, "m.1/0-FaceId-0.jpg")
    assert sum(map(len, images._files)) < 20 * len(images)
    with pytest.raises(IndexError):
        images[200_000]
