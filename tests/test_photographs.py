"""ExpW and CAER-S: faces cut out of whole photographs by their boxes."""

from pathlib import Path

import layouts
import numpy as np
import pytest
from packs import pack_here, refused
from PIL import Image

from shards.format import open_shardset
from shards.releases import caers, expw
from shards.releases.boxes import crop_box


def test_expw(tmp_path: Path) -> None:
    layouts.write_expw(tmp_path / "r" / "ExpW", 35, seed=0)
    release = expw.release(tmp_path / "r", margin=0.0)
    assert [item.label for item in release.splits["train"]] == [k % 7 for k in range(70)]
    face = np.asarray(release.read(release.splits["train"][3]).image).astype(int)
    drawn = layouts.draw_face(0, 3, layouts.CLASSES.index("happy"), size=24)
    assert face.shape == (24, 24, 3) and np.abs(face - np.asarray(drawn)).mean() < 5
    options = ("expw", "--source", tmp_path / "r", "--out", tmp_path / "out", "--size", "24",
               "--workers", "1", "--split", "0.6")  # fmt: skip
    code, output = pack_here(*options)
    assert code == 0 and "not all of ExpW: 70 images in train, officially 91793" in output
    shards = open_shardset(tmp_path / "out")
    photos = {}
    for name in ("train", "val"):
        split = shards.split(name)
        keys = [split.key(k).split("/")[1] for k in range(len(split))]
        photos[name] = {key.rpartition("_")[0] for key in keys}
    assert not photos["train"] & photos["val"] and len(photos["train"]) in range(20, 25)
    code, output = pack_here(*options[:3], "--out", tmp_path / "all", "--size", "24")
    assert code == 0 and "ExpW has no splits, all faces are 'train'" in output


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("photo_0.jpg 0 0 0 9 9 97.5 7", "line 5: 'photo_0.jpg 0 0 0 9 9 97.5 7', expected image"),
        ("photo_0.jpg 0 0 0 9 9 97.5", "expected image face top left right bottom confidence"),
        ("photo_0.jpg 0 a 0 9 9 97.5 1", "expected image face"),
        ("../photo_0.jpg 0 0 0 9 9 97.5 1", "expected image face"),
    ],
)
def test_bad_lines_of_expw(tmp_path: Path, line: str, error: str) -> None:
    layouts.write_expw(tmp_path / "r", 2, seed=0)
    path = tmp_path / "r" / "label.lst"
    path.write_text(f"{path.read_text()}\n{line}")
    assert error in refused(tmp_path / "r", "expw")


def test_what_expw_lists_and_lacks_is_counted(tmp_path: Path) -> None:
    layouts.write_expw(tmp_path / "r", 8, seed=0)
    (tmp_path / "r" / "origin" / "photo_7.jpg").rename(tmp_path / "r" / "origin" / "other.jpg")
    path = tmp_path / "r" / "label.lst"
    path.write_text(f"{path.read_text()}\nphoto_0.jpg 2 5 5 5 9 97.5 1")
    release = expw.release(tmp_path / "r", margin=0.0)
    assert release.left_out.counts == {
        "listed, but there is no image": 2, "a box that is no face": 1, "not in the list": 1
    }  # fmt: skip
    path.unlink()
    assert "label.lst not found; it holds origin/" in refused(tmp_path / "r", "expw")


def test_caer_s(tmp_path: Path) -> None:
    boxes = layouts.write_caers(tmp_path / "r" / "CAER-S", 14, 7, seed=0)
    assert "holds whole frames; give --boxes FILE" in refused(tmp_path / "r", "caers")
    path = tmp_path / "boxes.csv"
    rows = ["path,x,y,width,height", *(f"CAER-S/{row}" for row in boxes[1:]), "CAER-S/no,1,1,1,1"]
    path.write_text("\n".join(rows))
    release = caers.release(tmp_path / "r", boxes=path, margin=0.0)
    assert {split: len(items) for split, items in release.splits.items()} == {
        "train": 13, "test": 7
    }  # fmt: skip
    assert release.left_out.counts == {
        "not in boxes.csv: no face found": 1, "a box, but there is no image": 1
    }  # fmt: skip
    item = next(item for item in release.splits["train"] if item.label == 3)
    number = int(Path(item.source[0]).stem)
    drawn = layouts.draw_face(0, number, layouts.CLASSES.index("happy"), size=24)
    assert np.array_equal(np.asarray(release.read(item).image), np.asarray(drawn))


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (["a.png,1,2,3"], "line 1: 'a.png,1,2,3', expected path,x,y,width,height"),
        (["a.png,1,2,3,4", "a.png,1,2,3,4"], "line 2: a.png: named twice"),
        (["a.png,1,2,0,4"], "line 1: a.png: a box of 0×4 pixels"),
        (["a.png,1,2,3,4"], "names none of the images"),
    ],
)
def test_bad_boxes(tmp_path: Path, rows: list[str], error: str) -> None:
    layouts.write_caers(tmp_path / "r", 7, 7, seed=0)
    (tmp_path / "b.csv").write_text("\n".join(rows))
    assert error in refused(tmp_path / "r", "caers", "--boxes", tmp_path / "b.csv")


def test_a_box_is_widened_and_cut_off_at_the_edge() -> None:
    face, corner = crop_box(Image.new("RGB", (20, 10)), (2, 2, 10, 4), 0.5)
    assert face.size == (17, 8) and corner == (0, 0)
    with pytest.raises(ValueError, match="lies outside"):
        crop_box(Image.new("RGB", (20, 10)), (30, 2, 5, 5), 0.1)
