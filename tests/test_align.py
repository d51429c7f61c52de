"""Alignment: the transform's known answers, and landmarks by a detector."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run
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
