"""AffectNet's two releases at small size, packed by the documented command."""

import csv
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
from packs import pack_command, refused, samples
from PIL import Image

from dan_dist.config import load_config
from shards.releases import affectnet, affectnet_crops
from shards.releases.drawing.face import draw_face
from shards.releases.source import open_source


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
    shards, output = pack_command(reduced, "affectnet", "--size", "64")
    assert "AffectNet, the reduced release" in output and shards.release == "reduced release"
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
    assert "not all of AffectNet's reduced release" in output  # 48 images are not 287,651
    assert "134415" in output and "287651" in output and "3999" in output


def test_seven_classes_and_another_size(copy: Path) -> None:
    (copy / "val_set").rename(copy / "valid_set")  # as some copies have it
    shards, output = pack_command(copy, "affectnet", "--size", "32", "--classes", "7")
    assert shards.class_names == tuple(load_config("configs/affectnet7.yaml").data.classes or ())
    assert len(shards.counts["val"]) == 7 and shards.dropped["label 7 (contempt)"] == 2
    sample = samples(shards, "val")[0]
    assert Image.open(io.BytesIO(sample["jpg"])).size == (32, 32)
    landmarks = json.loads(sample["json"])["landmarks"]
    assert landmarks == np.round(np.linspace(0, 32, 136), 2).tolist()  # in the packed image
    assert "283901" in output and "3500" in output


def test_numeric_labels_and_missing_metadata_are_taken(copy: Path) -> None:
    notes = copy / "train_set" / "annotations"
    for path in notes.glob("*_exp.npy"):
        np.save(path, np.array(int(np.load(path)), np.int64))
    for path in notes.glob("*_lnd.npy"):
        path.unlink()
    shards, _ = pack_command(copy, "affectnet", "--size", "64")
    assert set(json.loads(samples(shards, "train")[0]["json"])) == {"valence", "arousal"}


def drop(relative: str) -> Callable[[Path], object]:
    return lambda root: (root / relative).unlink()


def write(relative: str, data: bytes) -> Callable[[Path], object]:
    return lambda root: (root / relative).write_bytes(data)


def label(value: object) -> Callable[[Path], object]:
    return lambda root: np.save(root / "train_set/annotations/0_exp.npy", value, allow_pickle=True)


def move(relative: str) -> Callable[[Path], object]:
    return lambda root: (root / relative).rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "error"),
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
    copy: Path, damage: Callable[[Path], object], error: str
) -> None:
    damage(copy)
    assert error in refused(copy, "affectnet", "--size", "64")


def test_images_and_annotations_without_each_other_are_named(copy: Path) -> None:
    (copy / "train_set/images/0.jpg").unlink()
    (copy / "train_set/annotations/2_exp.npy").unlink()
    shards, output = pack_command(copy, "affectnet", "--size", "64")
    assert shards.dropped["no annotation"] == 1
    assert shards.dropped["annotated, but there is no image"] == 1
    assert "images/2.jpg: no annotation" in output and sum(shards.counts["train"]) == 46


@pytest.mark.slow
def test_odd_files_of_the_reduced_release_are_named(copy: Path) -> None:
    notes = copy / "train_set/annotations"
    np.save(notes / "0_exp.npy", np.array(f"{int(np.load(notes / '0_exp.npy'))}.0"))  # is taken
    draw_face(0, 1, 0, size=64).save(copy / "train_set/images/2.png")
    np.save(notes / "4_lnd.npy", np.array([np.nan, 1]))
    for path in sorted(notes.glob("*_exp.npy")):  # more, so that one damaged is less than 1 %
        for k in range(2000, 2002):
            name = f"{path.name.removesuffix('_exp.npy')}{k}"
            shutil.copy(copy / "train_set/images/0.jpg", copy / f"train_set/images/{name}.jpg")
            shutil.copy(path, notes / f"{name}_exp.npy")
    np.save(notes / "6_val.npy", np.array([1.0, 2.0]))
    shards, output = pack_command(copy, "affectnet", "--size", "64")
    assert shards.dropped["a second image of its number"] == shards.dropped["unreadable"] == 1
    assert "2.png: a second image" in output and "6_val.npy: 2 numbers" in output


def test_an_empty_class_is_named(copy: Path) -> None:
    for path in (copy / "train_set/annotations").glob("*_exp.npy"):
        if int(np.load(path)) == 7:
            np.save(path, np.array("8"))
    assert "class 'contempt' has no training images" in refused(copy, "affectnet", "--size", "64")


def test_affectnets_full_release(tmp_path: Path) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 32, 16, size=48, seed=0)
    rows = list(csv.reader((root / "training.csv").open()))
    rows.append([*rows[1][:3], "-1", "-1", *rows[1][5:]])  # no face was found
    rows.append(rows[2])  # a second time
    rows.append([*rows[3][:6], "10", *rows[3][7:]])
    with (root / "training.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    shards, output = pack_command(root, "affectnet", "--size", "48", "--margin", "0.25")
    assert "AffectNet, the full release" in output
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
    assert "4000" in output  # of the full release's validation images


def test_a_list_without_header_and_in_its_own_folder(tmp_path: Path) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
    (root / "Manually_Annotated_file_lists").mkdir()
    for name in ("training.csv", "validation.csv"):
        lines = (root / name).read_text().splitlines()
        (root / name).unlink()
        (root / "Manually_Annotated_file_lists" / name).write_text("\n".join(lines[1:]))
    assert sum(pack_command(root, "affectnet", "--size", "32")[0].counts["train"]) == 16


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
    shards, output = pack_command(root, "affectnet", "--size", "32")
    assert sum(shards.counts["train"]) == 16
    assert shards.dropped == {
        "annotated, but there is no image": 1, "label 10 (non-face)": 1, "no annotation": 1
    }  # fmt: skip
    assert "training.csv, line 18: 0/none.jpg: annotated" in output
    assert "0/extra.jpg: no annotation" in output
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


@pytest.mark.parametrize(
    ("change", "error"),
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
    tmp_path: Path, change: dict[str, str], error: str
) -> None:
    root = tmp_path / "full"
    layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
    rows = list(csv.DictReader((root / "training.csv").open()))
    rows[0] |= change
    with (root / "training.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, affectnet.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    assert error in refused(root, "affectnet", "--size", "32")


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


def test_arrays_of_either_order_are_the_same(tmp_path: Path) -> None:
    points = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "c.npy", points)
    np.save(tmp_path / "f.npy", np.asfortranarray(points))
    source = open_source(tmp_path)
    for name in ("c.npy", "f.npy"):
        assert affectnet_crops._array(source, name).ravel().tolist() == [0, 1, 2, 3, 4, 5]
