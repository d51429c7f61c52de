"""The real releases' layouts, at small size, packed by the documented commands."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from conftest import run
from dan_dist.config import load_config
from shards.format import ShardSet, open_shardset
from shards.releases import affectnet
from shards.releases import identities
import layouts
from shards.releases import rafdb
from shards.releases import sfew
from shards.releases import source as source_files
from shards.releases.faces import CLASSES, face
from shards.release import Item, Release
from shards.releases.similarity import TEMPLATE, align, similarity
from shards.releases.source import Keys, read_file
from shards.packing.writer import pack


def packed(source: Path, kind: str, *options: str | Path) -> tuple[ShardSet, str]:
    """The shards that the documented command makes of `source`, and what it said."""
    out = source.parent / f"{source.name}-shards"
    done = run(sys.executable, "-m", "shards.pack", kind, "--source", source, "--out", out,
               "--overwrite", *options, cwd=source.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return open_shardset(out), done.stdout + done.stderr


def samples(shards: ShardSet, split: str) -> list[dict]:
    urls = [str(shards.root / shard.name) for shard in shards.shards[split]]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def refused(source: Path, kind: str, *options: str | Path) -> str:
    """The one line that the packer says of a source that it cannot pack."""
    out = source.parent / "refused"
    done = run(sys.executable, "-m", "shards.pack", kind, "--source", source, "--out", out,
               *options, cwd=source.parent)  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert not (out / "manifest.json").exists()
    return lines[0]


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("affectnet") / "reduced"
    layouts.write_affectnet_reduced(root, 48, 24, size=64, seed=0)
    for split, name, label in (("train_set", "900", "8"), ("train_set", "901", "10")):
        shutil.copy(root / split / "images" / "0.jpg", root / split / "images" / f"{name}.jpg")
        np.save(root / split / "annotations" / f"{name}_exp.npy", np.array(label))
    return root


@pytest.fixture
def copy(reduced: Path, tmp_path: Path) -> Path:
    """A copy of the reduced release, to be damaged."""
    shutil.copytree(reduced, tmp_path / "reduced")
    return tmp_path / "reduced"


def test_affectnets_reduced_release(reduced: Path) -> None:
    shards, said = packed(reduced, "affectnet", "--size", "64")
    assert "AffectNet, the reduced release" in said and shards.release == "reduced release"
    assert shards.class_names == tuple(load_config("configs/affectnet8.yaml").data.classes or ())
    labels = [int(np.load(p)) for p in (reduced / "train_set/annotations").glob("*_exp.npy")]
    assert shards.counts["train"] == tuple(np.bincount([k for k in labels if k < 8]))
    assert shards.counts["val"] == tuple(np.bincount([k for _, k in layouts._numbered(24, 48)]))
    assert shards.dropped == {"label 8 (none)": 1, "label 10 (non-face)": 1}
    for sample in samples(shards, "train"):
        key = sample["__key__"]
        assert sample["jpg"] == (reduced / "train_set/images" / f"{key}.jpg").read_bytes()
        assert int(sample["cls"]) == int(np.load(reduced / f"train_set/annotations/{key}_exp.npy"))
        meta = json.loads(sample["json"])
        assert (meta["valence"], meta["arousal"]) == (0.1, -0.2)
        assert meta["landmarks"] == np.round(np.linspace(0, 64, 136), 2).tolist()
    assert "not all of AffectNet's reduced release" in said  # 48 images are not 287,651
    assert "134415" in said and "287651" in said and "3999" in said


def test_seven_classes_and_another_size(copy: Path) -> None:
    (copy / "val_set").rename(copy / "valid_set")  # as some copies have it
    shards, said = packed(copy, "affectnet", "--size", "32", "--classes", "7")
    assert shards.class_names == tuple(load_config("configs/affectnet7.yaml").data.classes or ())
    assert len(shards.counts["val"]) == 7 and shards.dropped["label 7 (contempt)"] == 2
    sample = samples(shards, "val")[0]
    assert Image.open(io.BytesIO(sample["jpg"])).size == (32, 32)
    landmarks = json.loads(sample["json"])["landmarks"]
    assert landmarks == np.round(np.linspace(0, 32, 136), 2).tolist()  # in the packed image
    assert "283901" in said and "3500" in said


def test_numeric_labels_and_missing_metadata_are_taken(copy: Path) -> None:
    notes = copy / "train_set" / "annotations"
    for path in notes.glob("*_exp.npy"):
        np.save(path, np.array(int(np.load(path)), np.int64))
    for path in notes.glob("*_lnd.npy"):
        path.unlink()
    shards, _ = packed(copy, "affectnet", "--size", "64")
    assert set(json.loads(samples(shards, "train")[0]["json"])) == {"valence", "arousal"}


def test_affectnets_full_release(tmp_path: Path) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 32, 16, size=48, seed=0)
    rows = list(csv.reader((root / "training.csv").open()))
    rows.append([*rows[1][:3], "-1", "-1", *rows[1][5:]])  # no face was found
    rows.append(rows[2])  # a second time
    rows.append([*rows[3][:6], "10", *rows[3][7:]])
    with (root / "training.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    shards, said = packed(root, "affectnet", "--size", "48", "--margin", "0.25")
    assert "AffectNet, the full release" in said
    assert shards.release == "full release, boxes with margin 0.25"
    assert sum(shards.counts["train"]) == 32 and sum(shards.counts["val"]) == 16
    assert shards.dropped == {
        "a box that is no face": 1, "listed twice": 1, "label 10 (non-face)": 1
    }  # fmt: skip
    by_key = {sample["__key__"]: sample for sample in samples(shards, "train")}
    for row in csv.DictReader((root / "training.csv").open()):
        key = row["subDirectory_filePath"].removesuffix(".jpg").replace("/", "_")
        sample, box = by_key[key], [int(row[f"face_{k}"]) for k in ("x", "y", "width", "height")]
        if box[2] < 0 or row["expression"] == "10":
            continue
        photo = Image.open(root / "Manually_Annotated_Images" / row["subDirectory_filePath"])
        left, top = max(box[0] - 12, 0), max(box[1] - 12, 0)
        crop = photo.crop((left, top, min(box[0] + 60, 144), min(box[1] + 60, 144)))
        expected = np.asarray(crop.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
        found = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
        assert np.abs(found - expected).mean() < 3  # JPEG noise
        meta = json.loads(sample["json"])
        first = row["facial_landmarks"].split(";")[:2]
        corner = np.array([float(first[0]) - left, float(first[1]) - top])
        assert meta["landmarks"][:2] == pytest.approx(corner * 48 / np.array(crop.size), abs=0.01)
    assert "4000" in said  # of the full release's validation images


def test_a_list_without_header_and_in_its_own_folder(tmp_path: Path) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
    (root / "Manually_Annotated_file_lists").mkdir()
    for name in ("training.csv", "validation.csv"):
        lines = (root / name).read_text().splitlines()
        (root / name).unlink()
        (root / "Manually_Annotated_file_lists" / name).write_text("\n".join(lines[1:]))
    assert sum(packed(root, "affectnet", "--size", "32")[0].counts["train"]) == 16


def test_the_full_releases_lists_as_they_come(tmp_path: Path) -> None:
    """With a byte order mark, NULL for what there is not, blank lines, and photos of no row."""
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
    lines = (root / "training.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    rows[0][5] = rows[1][7] = "NULL"
    absent = [["0/none.jpg", *rows[2][1:]], [*rows[3][:1], *["NULL"] * 5, "10", "-2", "-2"]]
    text = "\r\n".join([lines[0], *(",".join(row) for row in [*rows, *absent]), "", ""])
    (root / "training.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    photo = root / "Manually_Annotated_Images" / "0" / "extra.jpg"
    shutil.copy(next(photo.parent.iterdir()), photo)
    shards, said = packed(root, "affectnet", "--size", "32")
    assert sum(shards.counts["train"]) == 16
    assert shards.dropped == {
        "annotated, but there is no image": 1, "label 10 (non-face)": 1, "no annotation": 1
    }  # fmt: skip
    assert "training.csv, line 18: 0/none.jpg: annotated" in said
    assert "0/extra.jpg: no annotation" in said
    metas = {s["__key__"]: json.loads(s["json"]) for s in samples(shards, "train")}
    keys = [row[0].removesuffix(".jpg").replace("/", "_") for row in rows]
    assert set(metas[keys[0]]) == {"valence", "arousal"}
    assert set(metas[keys[1]]) == {"arousal", "landmarks"}
    (root / "training.csv").write_bytes(text.encode().replace(b"0/none", b"caf\xe9"))
    assert "training.csv, line 18: b'caf\\xe9.jpg" in refused(root, "affectnet")


def test_the_landmarks_of_a_full_release_are_not_held_in_memory(tmp_path: Path) -> None:
    layouts.write_affectnet_full(tmp_path, 16, 8, size=32, seed=0)
    release = affectnet.release(tmp_path, size=32, margin=0.0)
    assert max(len(pickle.dumps(item)) for item in release.splits["train"]) < 200
    first = release.read(release.splits["train"][0])
    assert first.meta and len(first.meta["landmarks"]) == 136
    with (tmp_path / "training.csv").open("r+b") as file:
        file.seek(130)
        file.write(b"9" * 100)
    with pytest.raises(OSError, match=r"training\.csv was changed while it was packed"):
        release.read(release.splits["train"][0])


def test_raf_db(tmp_path: Path) -> None:
    layouts.write_rafdb(tmp_path / "raf" / "basic", 21, 14, seed=0)
    shards, said = packed(tmp_path / "raf", "rafdb")
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
    assert "12271" in said and "3068" in said


def test_sfews_aligned_faces(tmp_path: Path) -> None:
    layouts.write_sfew(tmp_path / "sfew", 14, 7, seed=0)
    (tmp_path / "sfew" / "Test").mkdir()  # its labels are withheld
    shards, _ = packed(tmp_path / "sfew", "sfew", "--size", "128")
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
    shards, said = packed(root, "sfew", "--size", "128", "--landmarks", tmp_path / "marks.csv")
    assert shards.dropped == {"not in marks.csv: no face found": 1}
    assert lines[0].split(",")[0] in said
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
    ("lines", "said"),
    [
        (["a.png,1,2,3"], "line 1: a.png: 3 numbers, expected 10"),
        (["a.png" + ",1" * 10, "a.png" + ",2" * 10], "line 2: a.png: named twice"),
        (["a.png" + ",x" * 10], "line 1: could not convert string to float: 'x'"),
        (["a.png" + ",1" * 10], "names none of the images"),
    ],
)
def test_bad_landmark_files(tmp_path: Path, lines: list[str], said: str) -> None:
    layouts.write_sfew(tmp_path / "frames", 7, 7, seed=0, aligned=False)
    (tmp_path / "marks.csv").write_text("\n".join(lines))
    assert said in refused(tmp_path / "frames", "sfew", "--landmarks", tmp_path / "marks.csv")


def test_similarity_transforms_have_known_answers() -> None:
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]])
    turned = np.array([[5, 1], [5, 5], [1, 5], [1, 1]])  # 90°, twice the size, shifted
    assert similarity(square, turned) == pytest.approx((2j, 5 + 1j))
    noisy = square + np.array([[0.1, 0], [-0.1, 0], [0.1, 0], [-0.1, 0]])
    a, b = similarity(noisy, square)  # the least squares, worked out by hand: 8 / 8.04
    assert a == pytest.approx(8 / 8.04) and b == pytest.approx((1 + 1j) * (1 - a))
    with pytest.raises(ValueError, match="are one point"):
        similarity([[3, 3]] * 5, TEMPLATE)
    with pytest.raises(ValueError, match="are one point"):
        similarity([[float("nan"), 3]] * 5, TEMPLATE)


def test_landmarks_of_no_face_are_refused() -> None:
    z, w = np.array([1, 2, -1, 3, -5], complex), TEMPLATE @ [1, 1j]
    w -= w.mean()
    z -= w * np.vdot(w, z) / np.vdot(w, w)  # of which nothing is like the template
    with pytest.raises(ValueError, match="are not those of a face"):
        align(face(0, 1, 0, size=64), np.stack([z.real, z.imag], axis=1), 64)


def test_aligning_to_its_own_template_changes_nothing() -> None:
    image = face(0, 3, 1, size=112)
    same = np.asarray(align(image, TEMPLATE, 112)).astype(int)
    assert np.abs(same - np.asarray(image).astype(int)).max() <= 1
    large = image.resize((560, 560), Image.Resampling.NEAREST)
    back = np.asarray(align(large, (TEMPLATE + 0.5) * 5 - 0.5, 112)).astype(int)
    assert np.abs(back - np.asarray(image).astype(int)).max() <= 2


def onnx_detector(path: Path, *, score: float) -> None:
    """A network of RetinaFace's outputs that always sees one face: box 100…300, five points."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    outputs, nodes = [], []
    for width in (1, 4, 10):
        for stride in (8, 16, 32):
            count = 2 * (640 // stride) ** 2
            values = np.zeros((count, width), np.float32)
            if stride == 8:
                anchor = 2 * (25 * 80 + 25)  # the first at (200, 200)
                points = [150, 160, 250, 160, 200, 200, 160, 260, 240, 260]
                offsets = {1: [score], 4: [100 / 8] * 4, 10: [(p - 200) / 8 for p in points]}
                values[anchor] = offsets[width]
            name = f"out_{width}_{stride}"
            nodes.append(helper.make_node("Constant", [], [name],
                                          value=numpy_helper.from_array(values)))  # fmt: skip
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, width]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 640, 640])
    graph = helper.make_graph(nodes, "always", [image], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


def test_align_writes_what_the_detector_finds(tmp_path: Path) -> None:
    pytest.importorskip("insightface", reason="pip install -e '.[align]' brings the detector")
    (tmp_path / "images" / "deep").mkdir(parents=True)
    Image.new("RGB", (1280, 640)).save(tmp_path / "images" / "deep" / "a.png")
    (tmp_path / "images" / "b.jpg").write_bytes(b"no image")
    command = [sys.executable, "-m", "shards.align", "--source", tmp_path / "images",
               "--out", tmp_path / "marks.csv", "--weights"]  # fmt: skip
    onnx_detector(tmp_path / "sees.onnx", score=0.9)
    done = run(*command, tmp_path / "sees.onnx", cwd=tmp_path)
    assert done.returncode == 0 and "1 faces written" in done.stdout, done.stderr
    assert "b.jpg" in done.stderr
    marks = sfew.read_landmarks(tmp_path / "marks.csv")
    # 1280 pixels were fitted to 640: points come back in pixels of the image.
    expected = (300, 320, 500, 320, 400, 400, 320, 520, 480, 520)
    assert marks == {"deep/a.png": pytest.approx(expected, abs=0.01)}
    onnx_detector(tmp_path / "blind.onnx", score=0.1)
    done = run(*command, tmp_path / "blind.onnx", cwd=tmp_path)
    assert "none found in 2 images" in done.stdout and "no face found in" in done.stderr
    for weights, line in (("no.onnx", "not found"), ("images/b.jpg", "b.jpg: ")):
        done = run(*command, tmp_path / weights, cwd=tmp_path)
        assert done.returncode == 2 and line in done.stderr.splitlines()[-1]


def test_identities(tmp_path: Path) -> None:
    root = tmp_path / "people"
    for identity in range(30):
        (root / f"m.{identity:03d}").mkdir(parents=True)
        for k in range(1 + identity % 4):
            image = face(0, 10 * identity + k, 0, size=32, identity=identity)
            image.save(root / f"m.{identity:03d}" / f"{k}-Face.jpg", quality=95)
    (root / "m.empty").mkdir()
    (root / "m.000" / "more").mkdir()
    shutil.copy(root / "m.000" / "0-Face.jpg", root / "m.000" / "more" / "0.jpg")
    shards, _ = packed(root, "identities", "--size", "32", "--shard-size", "16", "--held-out", "3")
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


# What may be wrong with a release: (what is done to it, what is said; None: it is left out).
def drop(relative: str) -> Callable[[Path], object]:
    return lambda root: (root / relative).unlink()


def write(relative: str, data: bytes) -> Callable[[Path], object]:
    return lambda root: (root / relative).write_bytes(data)


def label(value: object) -> Callable[[Path], object]:
    return lambda root: np.save(root / "train_set/annotations/0_exp.npy", value, allow_pickle=True)


def move(relative: str) -> Callable[[Path], object]:
    return lambda root: (root / relative).rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (move("train_set/annotations"), "holds no AffectNet release: neither train_set/annot"),
        (move("val_set/annotations"), "val_set/annotations not found"),
        (move("val_set/images"), "val_set/images not found"),
        (label(np.array("11")), "0_exp.npy: label 11, expected 0 to 10"),
        (label(np.array("-1")), "0_exp.npy: label -1, expected 0 to 10"),
        (label(np.array("happy")), "is no label"),
        (label(np.array(2.7)), "is no label: 2.7 is no whole number"),
        (label(np.array(np.inf)), "is no label: cannot convert float infinity"),
        (label(np.array(["1", "2"])), "is no label"),
        (label(np.array({"a": 1}, object)), "0_exp.npy: no plain array"),
        (write("train_set/annotations/0_exp.npy", b""), "0_exp.npy: no plain array"),
        (write("training.csv", b""), "holds both AffectNet releases"),
        (write("train_set/images/0.jpg", b""), "1 of 72 images are unreadable"),
    ],
)
def test_what_stops_a_pack_of_the_reduced_release(
    copy: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(copy)
    assert said in refused(copy, "affectnet", "--size", "64")


def test_images_and_annotations_without_each_other_are_named(copy: Path) -> None:
    (copy / "train_set/images/0.jpg").unlink()
    (copy / "train_set/annotations/2_exp.npy").unlink()
    shards, said = packed(copy, "affectnet", "--size", "64")
    assert shards.dropped["no annotation"] == 1
    assert shards.dropped["annotated, but there is no image"] == 1
    assert "images/2.jpg: no annotation" in said and sum(shards.counts["train"]) == 46


def test_odd_files_of_the_reduced_release_are_named(copy: Path) -> None:
    notes = copy / "train_set/annotations"
    np.save(notes / "0_exp.npy", np.array(f"{int(np.load(notes / '0_exp.npy'))}.0"))  # is taken
    face(0, 1, 0, size=64).save(copy / "train_set/images/2.png")
    np.save(notes / "4_lnd.npy", np.array([np.nan, 1]))
    for path in sorted(notes.glob("*_exp.npy")):  # more, so that one damaged is less than 1 %
        for k in range(2000, 2002):
            name = f"{path.name.removesuffix('_exp.npy')}{k}"
            shutil.copy(copy / "train_set/images/0.jpg", copy / f"train_set/images/{name}.jpg")
            shutil.copy(path, notes / f"{name}_exp.npy")
    np.save(notes / "6_val.npy", np.array([1.0, 2.0]))
    shards, said = packed(copy, "affectnet", "--size", "64")
    assert shards.dropped["a second image of its number"] == shards.dropped["unreadable"] == 1
    assert "2.png: a second image" in said and "6_val.npy: 2 numbers" in said


def test_pipes_and_huge_files_of_a_source_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(bytes(1000))
    monkeypatch.setattr(source_files, "MAX_BYTES", 999)
    for name, said in (("pipe", "no regular file"), ("huge", "1000 bytes, at most 999")):
        with pytest.raises(ValueError, match=said):
            read_file(tmp_path, name)


@pytest.mark.parametrize("kind", ["affectnet", "rafdb"])
def test_linked_folders_out_of_a_source_are_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "release"
    if kind == "affectnet":
        layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
        folder = root / "Manually_Annotated_Images"
    else:
        layouts.write_rafdb(root, 14, 7, seed=0)
        folder = root / "Image" / "aligned"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert f"{folder} is a link that leads out of the source" in refused(root, kind)


def test_an_empty_class_is_named(copy: Path) -> None:
    for path in (copy / "train_set/annotations").glob("*_exp.npy"):
        if int(np.load(path)) == 7:
            np.save(path, np.array("8"))
    assert "class 'contempt' has no training images" in refused(copy, "affectnet", "--size", "64")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expression": "12"}, "training.csv, line 2: label 12, expected 0 to 10"),
        ({"expression": ""}, "training.csv, line 2: '' is no label"),
        ({"face_x": "a"}, "training.csv, line 2: face box ['a', "),
        ({"face_x": "1e999"}, "training.csv, line 2: face box ['1e999', "),
        ({"facial_landmarks": "1;" * 70_000}, "training.csv, line 2: field larger than"),
        ({"facial_landmarks": "1;x"}, "1 of 24 images are unreadable"),
        ({"face_x": "9999"}, "lies outside (96, 96)"),
        ({"subDirectory_filePath": "../../secret.jpg"}, "leads out of the source"),
        ({"subDirectory_filePath": "/etc/hostname"}, "leads out of the source"),
    ],
)
def test_what_stops_a_pack_of_the_full_release(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
    rows = list(csv.DictReader((root / "training.csv").open()))
    rows[0] |= change
    with (root / "training.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, affectnet.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    assert said in refused(root, "affectnet", "--size", "32")


def test_broken_lists_of_the_full_release(tmp_path: Path) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
    whole = (root / "training.csv").read_text()
    (root / "training.csv").write_text(whole.replace("face_width", "width"))
    assert "column face_width is missing" in refused(root, "affectnet")
    (root / "training.csv").write_text(whole + "a,b\n")
    assert "line 18: 2 columns, expected 9" in refused(root, "affectnet")
    (root / "training.csv").write_text(whole)
    (root / "validation.csv").unlink()
    assert "validation.csv not found" in refused(root, "affectnet")


def test_broken_raf_db_lists(tmp_path: Path) -> None:
    root = tmp_path / "raf"
    layouts.write_rafdb(root, 70, 70, seed=0)
    path = root / "EmoLabel" / "list_patition_label.txt"
    whole = path.read_text()
    for line in ("train_00099.jpg 8", "train_00099.jpg", "../x.jpg 1"):
        path.write_text(f"{whole}\n{line}")
        assert f"line 141: '{line}', expected <train|test>" in refused(root, "rafdb")
    path.write_text("\n".join([*whole.split("\n")[1:], "test_0070.jpg 1", "train_00099.jpg 1"]))
    shards, said = packed(root, "rafdb", "--size", "native")
    assert shards.dropped == {
        "listed twice": 1, "listed, but there is no image": 1, "not in the partition list": 1
    }  # fmt: skip
    assert "train_00001_aligned.jpg: not in the partition list" in said
    path.unlink()
    assert "list_patition_label.txt not found" in refused(root, "rafdb")


def test_unknown_classes_and_missing_folders_of_sfew(tmp_path: Path) -> None:
    layouts.write_sfew(tmp_path / "sfew", 7, 7, seed=0)
    (tmp_path / "sfew/Train/Train_Aligned_Faces/Bored").mkdir()
    assert "Bored: expected one of Angry" in refused(tmp_path / "sfew", "sfew")
    shutil.rmtree(tmp_path / "sfew" / "Val")
    assert "Val not found" in refused(tmp_path / "sfew", "sfew")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """Names that are no UTF-8, as old archives hold them."""
    root = tmp_path / "people"
    for identity in (b"caf\xe9", b"caf\xe8"):
        folder = os.fsencode(root) + b"/" + identity
        Path(os.fsdecode(folder)).mkdir(parents=True)
        for name in (b"a\xff.jpg", b"a\xfe.jpg"):
            face(0, 1, 0, size=32).save(tmp_path / "face.jpg")
            shutil.copy(tmp_path / "face.jpg", folder + b"/" + name)
    shards, _ = packed(root, "identities", "--size", "32")
    assert shards.counts["train"] == (2, 2) and shards.class_names[1] == "caf\\xe9"
    (tmp_path / "tree").mkdir()
    for split in ("train", "val"):
        shutil.copytree(root, tmp_path / "tree" / split)
    shards, _ = packed(tmp_path / "tree", "folder", "--size", "32")
    assert shards.counts == {"train": (2, 2), "val": (2, 2)}


def test_links_and_paths_out_of_a_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "source" / "own").write_text("o")
    (tmp_path / "source" / "inward").symlink_to("own")
    (tmp_path / "source" / "outward").symlink_to("../secret")
    (tmp_path / "source" / "folder").symlink_to("..")
    assert read_file(tmp_path / "source", "inward") == b"o"
    for relative in ("outward", "folder/secret", "../secret", str(tmp_path / "secret")):
        with pytest.raises(ValueError, match="out of the source"):
            read_file(tmp_path / "source", relative)


def test_keys_are_given_once() -> None:
    keys = Keys()
    assert [keys.make("a", "a-jpg") for _ in range(3)] == ["a", "a-jpg", "a-jpg_"]
    odd = [keys.make(name) for name in ("a b", "a_b", "a.b", "的", "脸")]
    assert odd[1] == "a_b" and len(set(odd)) == 5
    assert all(re.fullmatch(r"a_b_[0-9a-f]{12}|a_b|__[0-9a-f]{12}", key) for key in odd)


def vanishing(item: Item) -> None:
    raise FileNotFoundError(2, "No such file or directory", item.source)


def test_a_source_that_vanishes_midway_stops_the_pack(tmp_path: Path) -> None:
    items = [Item(f"k{k}", 0, f"{k}.jpg") for k in range(50)]
    release = Release("gone", "x", ("only",), {"train": items}, vanishing)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '0\.jpg'"):
        pack(release, tmp_path / "out", size=32, workers=1, shard_size=10)


def test_a_full_disk_is_one_clear_error_and_packing_goes_on(reduced: Path, tmp_path: Path) -> None:
    """On a real file system of 300 KB, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = (
        f"mount -t tmpfs -o size=300k tmpfs {disk} && {sys.executable} -m shards.pack affectnet "
        f"--source {reduced} --out {disk}/out --size 224 --shard-size 4 --workers 2; echo code $?; "
        f"ls {disk}/out; mount -o remount,size=50m {disk}; {sys.executable} -m shards.pack "
        f"affectnet --source {reduced} --out {disk}/out --size 224 --shard-size 4 --workers 2; "
        f"{sys.executable} -m shards.verify {disk}/out"
    )
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("mounting needs root")
    done = run("unshare", "-m", "sh", "-c", command, cwd=tmp_path)
    assert "code 2" in done.stdout and "No space left on device" in done.stderr
    listing = done.stdout.split("code 2")[1].split("class")[0]
    assert "packing.json" in listing and "manifest.json" not in listing
    assert "partial" not in listing and ".done" in listing
    assert "72 images, all as they should be" in done.stdout, done.stdout + done.stderr


def test_classes_have_the_names_that_the_faces_are_drawn_by() -> None:
    assert set(rafdb.CLASSES) - {"happiness", "sadness"} <= set(CLASSES)
