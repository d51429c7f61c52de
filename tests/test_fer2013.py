"""FER-2013 and FERPlus: the CSV's two forms, folders, and the votes of ten people."""

import io
import json
import shutil
from pathlib import Path

import layouts
import numpy as np
import pytest
from packs import pack_here, refused, samples
from PIL import Image

from shards.format import open_shardset
from shards.releases import fer2013, ferplus

COUNTS = {"Training": 14, "PublicTest": 7, "PrivateTest": 7}
# Columns: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt, unknown, NF
ALL_AGREE = (0, 10, 0, 0, 0, 0, 0, 0, 0, 0)
VOTES = [
    *[[10 * (k == label) for k in range(10)] for label in range(8)],  # a face of each class
    [4, 0, 0, 1, 3, 2, 0, 0, 0, 0],  # 4 of 9 that count: no majority
    [6, 0, 1, 1, 0, 0, 0, 0, 2, 0],  # neutral
    [4, 0, 0, 4, 1, 0, 0, 0, 1, 0],  # a tie
    [0, 1, 0, 0, 0, 0, 0, 0, 8, 1],  # unknown
    [0, 1, 0, 0, 0, 0, 0, 0, 1, 8],  # no face
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fer") / "fer2013"
    layouts.write_fer2013(root, COUNTS, seed=0)
    return root


def test_the_csv_of_pixels(plain: Path, tmp_path: Path) -> None:
    code, output = pack_here("fer2013", "--source", plain, "--out", tmp_path / "out",
                             "--size", "48", "--workers", "1")  # fmt: skip
    assert code == 0 and "not all of FER-2013" in output and "28709" in output
    shards = open_shardset(tmp_path / "out")
    assert shards.counts == {"train": (2,) * 7, "val": (1,) * 7, "test": (1,) * 7}
    assert shards.class_names == ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    first = next(s for s in samples(shards, "train") if s["__key__"] == "fer0000003")
    drawn = layouts.draw_face(0, 3, layouts.CLASSES.index("happy"), size=48).convert("L")
    found = np.asarray(Image.open(io.BytesIO(first["jpg"])).convert("L")).astype(int)
    assert int(first["cls"]) == 3 and np.abs(found - np.asarray(drawn)).mean() < 3


def test_the_other_csv_has_a_header_with_spaces_and_another_order(
    plain: Path, tmp_path: Path
) -> None:
    layouts.write_fer2013(tmp_path / "deep" / "r", COUNTS, seed=0, name="icml_face_data.csv")
    one, other = fer2013.release(plain), fer2013.release(tmp_path)
    for split, items in one.splits.items():
        assert [i[:2] for i in other.splits[split]] == [i[:2] for i in items]
        pair = [found.read(found.splits[split][-1]).image for found in (one, other)]
        assert pair[0] == pair[1]


def test_folders(tmp_path: Path) -> None:
    for split, names in (("train", "Angry disgust fear happy neutral sad surprise"),
                         ("test", "angry happy neutral"), ("validation", "sad")):  # fmt: skip
        for k, name in enumerate(names.split()):
            path = tmp_path / "archive" / split / name / f"im{k}.png"
            path.parent.mkdir(parents=True)
            layouts.draw_face(0, k, 0, size=48).convert("L").save(path)
    release = fer2013.release(tmp_path)
    assert [item.label for item in release.splits["train"]] == [0, 1, 2, 3, 6, 4, 5]
    assert {split: len(items) for split, items in release.splits.items()} == {
        "train": 7, "val": 1, "test": 3
    }  # fmt: skip
    (tmp_path / "archive" / "train" / "contempt").mkdir()
    assert "contempt: expected one of angry" in refused(tmp_path, "fer2013")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("PublicTest", "Public", "line 16: Usage 'Public', expected Training, PublicTest, Pri"),
        ("emotion", "label", "line 1: column emotion is missing"),
        ("\r\n3,", "\r\n7,", "line 5: emotion '7', expected 0 to 6"),
        (" ", "", "line 2: 2303 pixels, expected 2304 (48×48)"),
        ("\r\n3,", "\r\n3,3,", "line 5: 4 columns, expected 3"),
    ],
)
def test_bad_lines_of_the_csv(plain: Path, tmp_path: Path, old: str, new: str, error: str) -> None:
    root = shutil.copytree(plain, tmp_path / "r")
    text = (root / "fer2013.csv").read_bytes().decode()
    (root / "fer2013.csv").write_bytes(text.replace(old, new, 1).encode())
    assert error in refused(root, "fer2013")


def test_parts_that_are_missing_are_named(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "train.csv").write_text("emotion,pixels\n")
    assert "train.csv lacks the test faces" in refused(tmp_path / "r", "fer2013")
    assert "fer2013new.csv not found; it holds fer2013.csv" in refused(plain, "ferplus")


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (ALL_AGREE, 1), (VOTES[8], None), (VOTES[9], 0), (VOTES[10], None), (VOTES[11], 8),
        ((5, 5, 0, 0, 0, 0, 0, 0, 0, 0), None),
        ((2, 1, 1, 1, 1, 1, 1, 1, 1, 0), 0),  # the single votes do not count
        (VOTES[13], None),
    ],
)  # fmt: skip
def test_the_majority_of_barsoum_et_al(votes: tuple[int, ...], winner: int | None) -> None:
    assert ferplus.majority(votes) == winner


def test_ferplus(tmp_path: Path) -> None:
    root, votes = tmp_path / "r", [*VOTES, *VOTES, *VOTES[:7], VOTES[7], [0] * 9 + [1]]
    layouts.write_fer2013(root, {"Training": 28, "PublicTest": 9}, seed=0, votes=votes)
    text = (root / "fer2013new.csv").read_text()
    (root / "fer2013new.csv").write_text(text.replace("fer0000036.png", ""))
    code, output = pack_here("ferplus", "--source", root, "--out", tmp_path / "out",
                             "--size", "48", "--workers", "1")  # fmt: skip
    assert code == 0 and "not all of FERPlus: 28 images in train, officially 28709" in output
    shards = open_shardset(tmp_path / "out")
    assert shards.counts == {"train": (4, *[2] * 7), "val": (1,) * 8}
    assert shards.dropped == {
        "no class has the majority of the votes": 6, "the majority's vote is unknown": 2,
        "the majority's vote is NF": 2, "taken out by the authors: the line names no image": 1,
    }  # fmt: skip
    ninth = next(s for s in samples(shards, "train") if s["__key__"] == "fer0000009")
    assert json.loads(ninth["json"])["votes"] == dict(zip(layouts.FERPLUS, VOTES[9], strict=True))
    split = shards.split("train")
    keys = [split.key(k).rpartition("/")[2] for k in range(len(split))]
    soft = split.index["soft"]
    assert soft[keys.index("fer0000009")] == pytest.approx(np.array(VOTES[9][:8]) / 8)
    assert soft[keys.index("fer0000001")].tolist() == list(ALL_AGREE[:8] / np.float32(10))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("fer0000001.png,0,10", "fer0000001.png,0,0", "line 3: votes: [0, 0, 0, 0, 0, 0, "),
        ("fer0000001.png,0,10", "fer0000001.png,0,x", "line 3: 'Training,fer0000001.png,0,x,"),
        ("Training,fer0000013", "PublicTest,fer0000013", "has 'val' at"),
        ("Usage,", "use,", "line 1: 'use,Image name,"),
        ("PrivateTest,fer0000027.png,", "", "expected 10 numbers of votes"),
        ("Training,fer0000001", "Training\r,fer0000001", "line 3: new-line character"),
        ("fer0000001.png,0,10", f"fer0000001.png,0,{'9' * 400}", "line 3: votes: a number is too"),
    ],
)  # fmt: skip
def test_bad_votes(tmp_path: Path, old: str, new: str, error: str) -> None:
    root = tmp_path / "r"
    layouts.write_fer2013(root, COUNTS, seed=0, votes=VOTES)
    text = (root / "fer2013new.csv").read_text()
    assert old in text
    (root / "fer2013new.csv").write_text(text.replace(old, new))
    assert error in refused(root, "ferplus")


def test_votes_of_other_faces(tmp_path: Path) -> None:
    layouts.write_fer2013(tmp_path / "r", COUNTS, seed=0, votes=VOTES)
    path = tmp_path / "r" / "fer2013new.csv"
    whole = path.read_text()
    path.write_text("\n".join(whole.splitlines()[:-1]))
    assert "fer2013new.csv ends; the two files are to have" in refused(tmp_path / "r", "ferplus")
    path.write_text(whole + whole.splitlines()[-1])
    assert "fer2013.csv has no such line" in refused(tmp_path / "r", "ferplus")
