"""Folders of pictures as they lie about: what is read, named, passed over and counted; outputs."""

import csv
import io
import json
import logging
import os
import socket
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from detectors import onnx_detector
from packs import pack_here
from PIL import Image
from pyarrow import parquet
from trees import encoded, picture, tree

from conftest import call_program, launch
from dan_dist.data.crops import find_images
from dan_dist.inference import predict as prediction
from dan_dist.model.weights import load_trained
from dan_dist.options import PredictOptions
from shards import folders
from shards.files import read_regular
from shards.format import open_shardset
from shards.release import LeftOut
from shards.releases.source import Source, walk


def album(root: Path) -> Path:
    """Four pictures, two of them in folders below, among all that lies beside pictures."""
    (root / "deep" / "er").mkdir(parents=True)
    for name in ("1.JPG", "2.jfif", "deep/3.jpe", "deep/er/4"):
        (root / name).write_bytes(encoded(picture(len(name), (32, 32)), "JPEG", quality=95))
    for companion in ("__MACOSX", ".ipynb_checkpoints", "deep/@eaDir"):
        (root / companion).mkdir()
        (root / companion / "1.jpg").write_bytes(b"a picture of none")
    for name in ("._1.JPG", ".DS_Store", "Thumbs.db", "deep/Desktop.ini"):
        (root / name).write_bytes(b"\0\5\x16\7")
    (root / "notes.txt").write_text("of the journey")
    (root / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    return root


def add_oddities(root: Path, elsewhere: Path) -> None:
    """What has no bytes to read, or no end of them."""
    elsewhere.mkdir()
    os.mkfifo(elsewhere / "pipe")
    (root / "5.jpg").symlink_to(elsewhere / "pipe")
    (root / "6.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as own:
        here = Path.cwd()
        os.chdir(root)  # a socket's path has a hundred characters at most
        try:
            own.bind("7")
        finally:
            os.chdir(here)
    (root / "8.png").symlink_to("nowhere")
    (root / "9.png").write_bytes(b"%PDF-1.7")
    (elsewhere / "true.png").write_bytes(encoded(picture(3), "PNG"))
    (root / "linked.png").symlink_to(elsewhere / "true.png")


def test_one_walk_finds_the_pictures_and_counts_the_rest(tmp_path: Path) -> None:
    root = album(tmp_path / "album")
    left_out = LeftOut(root)
    expected = ["1.JPG", "2.jfif", "deep/3.jpe", "deep/er/4"]
    assert list(walk(root, Source(root), left_out)) == expected
    assert left_out.passed_over == {
        "hidden": 3, "left by a file manager": 4, "no picture (.txt)": 1, "no picture (.mp4)": 1,
    }  # fmt: skip
    assert [str(p.relative_to(root)) for p in find_images([root])] == expected


def test_links_that_go_round_end(tmp_path: Path) -> None:
    """A loop of one, of two, and folders that meet again at every depth."""
    for k in range(20):
        (tmp_path / "f" / f"d{k}").mkdir(parents=True)
    (tmp_path / "f" / "d19" / "1.png").touch()
    (tmp_path / "f" / "self").symlink_to(".")
    (tmp_path / "f" / "d0" / "other").symlink_to("../d1")
    (tmp_path / "f" / "d1" / "back").symlink_to("../d0")
    left_out = LeftOut(tmp_path)
    assert list(walk(tmp_path / "f", Source(tmp_path / "f"), left_out)) == ["d19/1.png"]
    assert left_out.passed_over["links to a folder that is walked already"] == 3
    for k in range(19):
        for name in "ab":
            (tmp_path / "f" / f"d{k}" / name).symlink_to(f"../d{k + 1}")
    assert len(find_images([tmp_path / "f"])) == 1


def test_a_link_that_leads_round_costs_no_other_picture(tmp_path: Path) -> None:
    """To itself, and one to another: neither a folder nor a file, and given, to be named."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.png").write_bytes(encoded(picture(1), "PNG"))
    for name, target in (("2.jpg", "2.jpg"), ("3", "4"), ("4", "3")):
        (tmp_path / "f" / name).symlink_to(target)
    assert [path.name for path in find_images([tmp_path / "f"])] == ["1.png", "2.jpg", "3", "4"]


def test_packing_leaves_out_a_link_that_leads_round(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    (source / "train" / "happy" / "a.png").symlink_to("a.png")
    (source / "val" / "b.jpg").symlink_to("b.jpg")
    code, text = pack_here("folder", "--source", source, "--out", tmp_path / "out", "--size", "24",
                           "--workers", "1")  # fmt: skip
    assert code == 0 and "left out: 1 × no regular file" in text, text
    assert open_shardset(tmp_path / "out").counts == {"train": (9, 9), "val": (3, 3)}


def test_links_to_folders_elsewhere_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.png").touch()
    (tmp_path / "f" / "all").symlink_to("/")
    with caplog.at_level(logging.INFO):
        assert find_images([tmp_path / "f"]) == [tmp_path / "f" / "1.png"]
    assert "f/all: a link to a folder elsewhere" in caplog.text


def test_a_folder_that_cannot_be_listed_is_given_as_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = album(tmp_path / "album")
    scan = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_images([root])
    assert [path.name for path in found] == ["1.JPG", "2.jfif", "deep"]
    with pytest.raises(PermissionError):  # packing stops
        list(walk(root, Source(root), LeftOut(root)))


def test_files_are_read_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "file", 8) == b"12345678"
    assert read_regular(tmp_path / "file", 3, cut=True) == b"123"
    assert read_regular(tmp_path / "file", 2**50, cut=True) == b"12345678"  # no room is made for it
    assert read_regular("/proc/self/status", 1 << 20).startswith(b"Name:")  # its size is 0
    for path, line in (("/dev/zero", "no regular file"), (tmp_path / "pipe", "no regular file"),
                       (tmp_path, "no regular file"), (tmp_path / "file", "8 bytes, at most 7"),
                       ("/proc/self/status", "at most 7 are read")):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            read_regular(path, 7)


def predicted(
    run: Path, images: list[Path], capsys: pytest.CaptureFixture[str], **options: object
) -> tuple[int, list[dict]]:
    """How many images could not be read, and the lines of JSON."""
    given = PredictOptions(checkpoint=run, images=tuple(images), json=True, device="cpu", **options)
    faults = prediction.main(given)
    return faults, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def in_parts_of_three(program: str, words: list[str]) -> None:
    prediction.CHUNK, prediction.PHOTOGRAPHS = 3, 1
    call_program(program, words)


def check_same(rows: list[dict], printed: str) -> None:
    """Two ranks print the rows of one, in their order."""
    both = [json.loads(line) for line in printed.splitlines()]
    for row, own in zip(rows, both, strict=True):
        wanted, found = row.pop("probabilities", {}), own.pop("probabilities", {})
        assert row == own and found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_two_ranks_predict_as_one(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In parts of three: two rounds, the last part of two images."""
    root = album(tmp_path / "album")
    add_oddities(root, tmp_path / "elsewhere")
    for name in ("0.png", "deep/er/4"):  # in the first rank's first part, the other's last
        (root / name).write_bytes(encoded(picture(4, (40, 32)), "PNG"))
    monkeypatch.setattr(prediction, "CHUNK", 3)
    faults, rows = predicted(baseline_run, [root], capsys)
    assert faults and -(-len(rows) // 3) % 2 == 0 and len(rows) % 3
    done = launch(
        "predict", 2, baseline_run, root, "--json", "--csv", tmp_path / "t.csv", "--device", "cpu",
        cwd=tmp_path, inside=in_parts_of_three,
    )  # fmt: skip
    files = [tmp_path / name for name in ("one.parquet", "one.npy", "one.csv")]
    pictures = [row["image"] for row in rows if "probabilities" in row][:2]
    words = [w for n, f in zip(("parquet", "features", "csv"), files, strict=True)
             for w in (f"--{n}", f)]  # fmt: skip
    few = launch("predict", 2, baseline_run, *pictures, *words, "--device", "cpu", cwd=tmp_path)
    assert few.returncode == 0, few.stderr  # the second rank has no picture
    assert len(pd.read_parquet(files[0])) == len(np.load(files[1])) == 2
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("no squares") == done.stderr.count("\n2 images are no squares") == 1
    check_same(rows, done.stdout)
    table = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert [line[0] for line in table[1:]] == [row["image"] for row in rows]


@pytest.mark.slow
def test_two_ranks_find_faces_as_one(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A photograph at a time, of unequal numbers of faces; the last round is one rank's alone."""
    pytest.importorskip("insightface", reason="pip install -e '.[align]' reads the detector")
    detector, photographs = tmp_path / "d.onnx", tmp_path / "photographs"
    onnx_detector(detector, [(160, 120), (400, 480)], half=32, score=0.9)
    photographs.mkdir()
    for k, size in enumerate([(640, 640), (640, 240), (320, 320), (640, 640)]):
        picture(k, size).save(photographs / f"{k}.png")  # in the second, one lies outside
    (photographs / "4.png").write_bytes(b"%PDF-1.7")
    options = {"faces": True, "detector": detector, "face_cut": "box:0.1"}
    faults, rows = predicted(baseline_run, [photographs], capsys, **options)
    words = ["--faces", "--detector", detector, "--face-cut", "box:0.1", "--device", "cpu"]
    done = launch("predict", 2, baseline_run, photographs, "--json", *words, cwd=tmp_path,
                  inside=in_parts_of_three)  # fmt: skip
    assert faults == 2 and done.returncode == 1, done.stderr
    assert [row.get("face") for row in rows] == [1, 2] * 4 + [None]
    assert "7 faces in 5 photographs; no face found in 0" in done.stderr
    check_same(rows, done.stdout)


def test_one_unreadable_file_ends_nothing_and_every_output_has_its_row(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root, out = album(tmp_path / "album"), tmp_path / "new" / "out"
    add_oddities(root, tmp_path / "elsewhere")
    files = {"csv": out / "t.csv", "parquet": out / "t.parquet", "features": out / "f.npy",
             "draw": out / "drawn"}  # fmt: skip
    monkeypatch.setattr(prediction, "CHUNK", 3)  # of which one holds no picture that is read
    faults, rows = predicted(baseline_run, [root], capsys, **files)
    names = [Path(row["image"]).name for row in rows]
    assert names == ["1.JPG", "2.jfif", "5.jpg", "6.jpg", "7", "8.png", "9.png", "3.jpe", "4",
                     "linked.png"]  # fmt: skip
    errors = {Path(row["image"]).name: row["error"] for row in rows if "error" in row}
    assert faults == 5 and list(errors) == ["5.jpg", "6.jpg", "7", "8.png", "9.png"]
    assert [errors[name] for name in ("5.jpg", "6.jpg", "7")] == ["no regular file"] * 3
    assert "No such file" in errors["8.png"] and "a PDF" in errors["9.png"]

    classes = load_trained(baseline_run).class_names
    table = list(csv.reader(io.StringIO(files["csv"].read_text())))
    columns = parquet.read_table(files["parquet"]).to_pylist()
    assert table[0] == list(columns[0])
    assert table[0] == ["path", "class", "error", *(f"probability_{name}" for name in classes)]
    for row, line, column in zip(rows, table[1:], columns, strict=True):
        assert line[0] == column["path"] == row["image"]
        assert (line[1], line[2]) == (row.get("class", ""), row.get("error", ""))
        assert (column["class"], column["error"]) == (row.get("class"), row.get("error"))
        given = list(row.get("probabilities", {}).values())
        assert [float(v) for v in line[3:] if v] == given
        assert [column[n] for n in table[0][3:] if column[n] is not None] == given

    monkeypatch.undo()
    again, same = predicted(baseline_run, [root], capsys, features=out / "f.parquet")
    assert again == 5 and [r.get("class") for r in same] == [r.get("class") for r in rows]
    features = np.load(files["features"])
    kept = parquet.read_table(out / "f.parquet").to_pylist()
    assert features.shape == (10, 128) and features.dtype == np.float32
    for row, values, line in zip(rows, features, kept, strict=True):
        if "error" in row:
            assert np.isnan(values).all() and line["features"] is line["l2_norm"] is None
        else:
            assert np.linalg.norm(values) == pytest.approx(1, abs=1e-5) and line["l2_norm"] > 0
            assert np.allclose(values, line["features"], atol=1e-5)
    drawn = sorted(path.name for path in files["draw"].iterdir())
    assert drawn == ["000001-1.jpg", "000002-2.jpg", "000008-3.jpg", "000009-4.jpg",
                     "000010-linked.jpg"]  # fmt: skip
    with Image.open(files["draw"] / drawn[0]) as sheet:
        assert sheet.width >= 256 and sheet.height > sheet.width * 0.9
    assert {path.name for path in out.iterdir()} == {"t.csv", "t.parquet", "f.npy", "f.parquet",
                                                     "drawn"}  # fmt: skip


def test_lists_of_paths(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root = album(tmp_path / "album")
    lines = [root / "1.JPG", "", root / "gone.jpg", "https://example.org/x.jpg", root / "deep"]
    (tmp_path / "paths.txt").write_text("\n".join(map(str, lines)) + "\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(root / "2.jfif"))))
    faults, rows = predicted(baseline_run, [tmp_path / "paths.txt", Path("-")], capsys)
    assert faults == 2
    assert [Path(r["image"]).name for r in rows] == ["1.JPG", "gone.jpg", "x.jpg", "3.jpe", "4",
                                                     "2.jfif"]  # fmt: skip
    assert "No such file" in rows[1]["error"] and "an address" in rows[2]["error"]


def test_a_bad_command_is_refused_before_anything_is_computed(
    baseline_run: Path, tmp_path: Path
) -> None:
    root, checkpoint = album(tmp_path / "album"), baseline_run / "best.pt"
    (root / "empty.txt").write_text("\n")
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(60))
    cases: list[tuple[Path, Path, dict[str, Path], str]] = [
        (checkpoint, Path("https://example.org/x.jpg"), {}, "x.jpg: an address; download"),
        (tmp_path / "x.onnx", root, {}, "expected a checkpoint, this is an ONNX network"),
        (root / "1.JPG", root, {}, "a picture, expected a checkpoint"),
        (root / "film.mp4", root, {}, "expected a checkpoint, this is a video"),
        (checkpoint, root, {"features": tmp_path / "f.csv"}, r"expected a file \.npy or \.parquet"),
        (checkpoint, root, {"csv": tmp_path / "a", "parquet": tmp_path / "a"}, "two outputs"),
        (checkpoint, root, {"csv": root}, "a folder, expected a file"),
        (checkpoint, root / "empty.txt", {}, r"empty\.txt: no path in it"),
    ]
    for path, images, files, line in cases:
        with pytest.raises((ValueError, OSError), match=line):
            prediction.main(PredictOptions(checkpoint=path, images=(images,), **files))


def test_packing_counts_what_it_passes_over(tmp_path: Path) -> None:
    passed_over: Counter[str] = Counter()
    entries = folders.entries(album(tmp_path / "album"), passed_over)
    pictures = [e.name for e in entries if not e.is_dir() and folders.is_picture(e, passed_over)]
    assert pictures == ["1.JPG", "2.jfif"]
    assert folders.describe(passed_over) == (
        "3 hidden, 2 left by a file manager, 1 no picture (.mp4), 1 no picture (.txt)"
    )
