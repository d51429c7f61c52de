"""What is given to predict and explain: lists, companions, folders without pictures, addresses."""

import io
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectors import onnx_detector
from ranks import ranks
from test_folders import album, predicted
from trees import encoded, picture

from dan_dist.data.crops import find_images
from dan_dist.inference import predict as prediction
from dan_dist.inference.outputs import Files, Row, writing
from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.model.weights import load_trained
from dan_dist.options import PredictOptions


def named(way: str, paths: list[Path], folder: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """Paths as arguments, in a list, or on the standard input."""
    lines = b"\n".join(map(os.fsencode, paths))
    if way == "list":
        (folder / "all.TXT").write_bytes(lines)
        return [folder / "all.TXT"]
    if way == "-":
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return [Path("-")]
    return paths


WAYS = pytest.mark.parametrize("way", ["arguments", "list", "-"])


@WAYS
def test_companions_are_passed_over_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """By packing's rule, and counted; other hidden files are meant."""
    root = album(tmp_path / "album")
    for hidden in (".me.png", "deep/.older/2.png", "EHThumbs.db"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(encoded(picture(1), "PNG"))
    given = ["1.JPG", "._1.JPG", "__MACOSX/1.jpg", ".ipynb_checkpoints/1.jpg", ".me.png",
             "deep/@eaDir", "EHThumbs.db", ".DS_Store", "deep/.older/2.png"]  # fmt: skip
    paths = named(way, [root / path for path in given], tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO):
        found = find_images(paths)
    assert found == [root / path for path in ("1.JPG", ".me.png", "deep/.older/2.png")]
    assert caplog.messages == [
        "passed over of what is named: 3 hidden, 3 left by a file manager"
    ]  # fmt: skip
    alone = named(way, [root / "._1.JPG", root / "Thumbs.db"], tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="passed over: 1 hidden, 1 left by a file manager"):
        find_images(alone)


@WAYS
def test_a_folder_without_pictures_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    root, bare = album(tmp_path / "album"), tmp_path / "bare"
    (bare / "deep").mkdir(parents=True)
    (bare / "text.md").write_text("of pictures")
    paths = named(way, [bare, root / "deep"], tmp_path, monkeypatch)
    (tmp_path / "nothing.txt").write_text("\n \n")
    found = find_images([*paths, tmp_path / "nothing.txt"])
    assert found == [root / "deep" / "3.jpe", root / "deep" / "er" / "4"]
    warned = [own.getMessage() for own in caplog.records if own.levelno == logging.WARNING]
    assert len(warned) == 2 and warned[0].startswith(f"{bare}: no image in it (.avif, ")
    assert warned[1] == f"{tmp_path / 'nothing.txt'}: no path in it"
    paths = named(way, [bare, bare / "deep"], tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"bare: no image in it .*deep: no image in it"):
        find_images(paths)


def test_a_list_of_another_ending_gets_a_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read as an image, as pictures without an ending are, without a hint."""
    (tmp_path / "paths.lst").write_text("größe/1.jpg\nb/2.jpg\n")
    (tmp_path / "no-ending").write_bytes(encoded(picture(1), "PNG"))
    (tmp_path / "sound").write_bytes(b"ID3\4\0\0")
    (tmp_path / "web.jpg").write_text("<html>not found</html>")
    given = [tmp_path / name for name in ("paths.lst", "no-ending", "sound", "web.jpg")]
    assert find_images(given) == given
    assert caplog.messages == [
        f"{given[0]}: read as an image; the name of a list of paths ends in .txt"
    ]


def test_an_address_is_named_as_one() -> None:
    """In any case of its letters; as a picture, a checkpoint, a backbone."""
    for address in ("HTTP://example.org/run/best.pt", "s3://bucket/best.pt", "Gs://b/x"):
        with pytest.raises(ValueError, match="an address; download the file first"):
            find_images([Path(address)])
        with pytest.raises(ValueError, match="an address, expected a checkpoint; download"):
            load_trained(Path(address))
        with pytest.raises(ValueError, match="an address, expected a file; download it first"):
            load_backbone(DAN(8, 0), address)


def test_changed_aspect_ratios_are_told_once(
    baseline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Over all parts, with the first of all."""
    for k in range(7):
        picture(k, (32, 32 if k in (0, 4) else 40)).save(tmp_path / f"{k}.png")
    monkeypatch.setattr(prediction, "CHUNK", 2)
    faults, rows = predicted(baseline_run, [tmp_path / f"{k}.png" for k in range(7)], capsys)
    assert not faults and len(rows) == 7
    assert [own.getMessage() for own in caplog.records if "aspect" in own.getMessage()] == [
        "5 images are no squares: their aspect ratio was changed to one; the first: "
        f"{tmp_path / '1.png'}, 32×40 pixels"
    ]


def test_what_cannot_be_read_again_is_not_drawn_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gone or spoilt since it was predicted; a disk that takes no picture ends it."""
    values = (np.float32([0.25, 0.75]), np.zeros(512, np.float32))
    paths = [tmp_path / name for name in ("gone.png", "spoilt.png", "whole.png")]
    paths[1].write_bytes(encoded(picture(2), "PNG")[:90])
    picture(3).save(paths[2])
    rows = [Row(k, path, None, None, "", *values) for k, path in enumerate(paths, start=1)]
    with writing(Files(None, None, None, tmp_path), ["sad", "happy"], 512, faces=False) as write:
        write(rows)
    assert [path.name for path in tmp_path.glob("0*")] == ["000003-whole.jpg"]
    assert len(caplog.messages) == 2
    for line, path, reason in zip(
        caplog.messages, paths, ("No such file", "cannot be decoded"), strict=False
    ):
        assert line.startswith(f"{path} is not drawn, as it cannot be read again: ")
        assert reason in line
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match="file"),
        writing(
            Files(None, None, None, tmp_path / "file"), ["sad", "happy"], 512, faces=False
        ) as write,
    ):
        write(rows[2:])


def test_the_bar_is_not_drawn_anew_for_each_row(
    baseline_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Where rows go into a file and the bar into a log."""
    monkeypatch.setattr(prediction, "FEW", 0)
    paths = [tmp_path / f"{k}.png" for k in range(40)]
    for k, path in enumerate(paths):
        picture(k).save(path)
    given = PredictOptions(checkpoint=baseline_run, images=tuple(paths), device="cpu")
    assert prediction.main(given) == 0
    printed, logged = capfd.readouterr()
    assert len(printed.splitlines()) == 41 and "predicting" in logged
    assert logged.count("\r") < 20


def peak_kib(run: Path, listed: Path, detector: Path, out: Path) -> int:
    """The most memory that a prediction with all its files has taken, of a process of its own."""
    files = {"csv": out / "t.csv", "parquet": out / "t.parquet", "features": out / "f.npy"}
    options = {"faces": True, "detector": detector, "face_cut": "box:0", **files}
    given = PredictOptions(checkpoint=run, images=(listed,), json=True, device="cpu", **options)
    assert prediction.main(given) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_photographs(
    baseline_run: Path, tmp_path: Path
) -> None:
    """Two and a half times as many take a tenth more at most; the first have warmed all up."""
    pytest.importorskip("insightface", reason="pip install -e '.[align]' reads the detector")
    onnx_detector(tmp_path / "d.onnx", [(160, 160), (480, 320)], half=64, score=0.9)
    paths = [tmp_path / f"{k}.jpg" for k in range(128)]
    for k, path in enumerate(paths):
        picture(k, (160, 160)).save(path)
    found = []
    for times in (2, 5):
        listed = tmp_path / f"{times}.txt"
        listed.write_text("\n".join(map(str, paths * times)))
        words = (baseline_run, listed, tmp_path / "d.onnx", tmp_path / f"{times}")
        found += ranks(1, peak_kib, *words, timeout_s=300)
        assert np.load(tmp_path / f"{times}" / "f.npy", mmap_mode="r").shape == (256 * times, 128)
    assert found[1] <= 1.10 * found[0]
