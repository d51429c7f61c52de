"""Alignment: the transform's known answers, and landmarks by a detector."""

import sys
from pathlib import Path

import numpy as np
import pytest
from detectors import onnx_detector
from PIL import Image

from conftest import run
from shards.align import write_landmarks
from shards.detect import Face
from shards.releases import sfew
from shards.releases.drawing.face import draw_face
from shards.releases.similarity import TEMPLATE, align, similarity


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
        align(draw_face(0, 1, 0, size=64), np.stack([z.real, z.imag], axis=1), 64)


def test_aligning_to_its_own_template_changes_nothing() -> None:
    image = draw_face(0, 3, 1, size=112)
    same = np.asarray(align(image, TEMPLATE, 112)).astype(int)
    assert np.abs(same - np.asarray(image).astype(int)).max() <= 1
    large = image.resize((560, 560), Image.Resampling.NEAREST)
    back = np.asarray(align(large, (TEMPLATE + 0.5) * 5 - 0.5, 112)).astype(int)
    assert np.abs(back - np.asarray(image).astype(int)).max() <= 2


@pytest.mark.slow
def test_align_writes_what_the_detector_finds(tmp_path: Path) -> None:
    pytest.importorskip("insightface", reason="pip install -e '.[align]' brings the detector")
    (tmp_path / "images" / "deep").mkdir(parents=True)
    Image.new("RGB", (1280, 640)).save(tmp_path / "images" / "deep" / "a.png")
    (tmp_path / "images" / "b.jpg").write_bytes(b"no image")
    command = [sys.executable, "-m", "shards.align", "--source", tmp_path / "images",
               "--out", tmp_path / "marks.csv", "--weights"]  # fmt: skip
    onnx_detector(tmp_path / "sees.onnx", [(200, 200)], half=100, score=0.9)
    done = run(*command, tmp_path / "sees.onnx", cwd=tmp_path)
    assert done.returncode == 0 and "1 faces written" in done.stdout, done.stderr
    assert "b.jpg" in done.stderr
    marks = sfew.read_landmarks(tmp_path / "marks.csv")
    # 1280 pixels were fitted to 640: points come back in pixels of the image.
    expected = (300, 320, 500, 320, 400, 400, 320, 520, 480, 520)
    assert marks == {"deep/a.png": pytest.approx(expected, abs=0.01)}
    onnx_detector(tmp_path / "blind.onnx", [(200, 200)], half=100, score=0.1)
    done = run(*command, tmp_path / "blind.onnx", cwd=tmp_path)
    assert "none found in 2 images" in done.stdout and "no face found in" in done.stderr
    for weights, line in (("no.onnx", "not found"), ("images/b.jpg", "b.jpg: ")):
        done = run(*command, tmp_path / weights, cwd=tmp_path)
        assert done.returncode == 2 and line in done.stderr.splitlines()[-1]


def test_a_name_that_no_list_can_hold_costs_that_image_alone(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    Image.new("RGB", (64, 64)).save(source / "a.png")
    (source / "b\udcff.png").write_bytes((source / "a.png").read_bytes())
    face = Face((0.0, 0.0, 9.0, 9.0), np.arange(10, dtype=np.float32).reshape(5, 2), 0.9)
    assert write_landmarks(source, lambda image: [face], tmp_path / "marks.csv") == (1, 1)
    assert [*sfew.read_landmarks(tmp_path / "marks.csv")] == ["a.png"]
