"""A look inside: the program on real trainings, its figures, numbers, refusals."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import DAN as TWO_HEADS
from conftest import LAUNCH, TINY, run, single
from dan_dist.distributed.world import World
from dan_dist.inference import explain as explanation
from dan_dist.inference import predict as prediction
from dan_dist.inference.attention import attention_maps
from dan_dist.inference.explanation import batches, pooled
from dan_dist.inference.inputs import OVERLAP_IMAGES, evenly
from dan_dist.inference.metrics import head_overlap
from dan_dist.model.weights import load_trained
from dan_dist.options import ExplainOptions, PredictOptions
from dan_dist.run import checkpoint
from shards.format import ShardSet


def explain(checkpoint: Path, *images: Path, tracked: bool = False, **options: Any) -> Any:
    """The program, in this process; returns the JSON file's content."""
    chosen = ExplainOptions(
        checkpoint=checkpoint, images=images, no_tracking=not tracked, **options
    )
    return explanation.main(chosen)


def test_images_are_taken_evenly(faces: ShardSet) -> None:
    split = faces.split("train")
    counts = np.bincount(split.index["label"])
    chosen = evenly(split, 32).index
    assert (np.bincount(chosen["label"]) == np.minimum(counts, 4)).all()
    assert len(np.unique(chosen)) == len(chosen)
    assert set(chosen["label"][:8]) == set(range(8))
    assert (chosen == evenly(split, 32).index).all()
    assert len(evenly(faces.split("val"), 2000)) == 16


@pytest.fixture(scope="module")
def runs(faces: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trainings: DAN at 64 px, where maps have 2 × 2 places, with and without affinity loss;
    the baseline at 32 px, where they have one."""
    folder = tmp_path_factory.mktemp("runs")
    dan = [*TWO_HEADS, "model.image_size=64"]
    for name, overrides in {
        "affinity": dan, "none": [*dan, "loss.fcn=none"], "baseline": []
    }.items():  # fmt: skip
        config = folder / f"{name}.yaml"
        config.write_text(TINY.format(shards=faces.root, output=folder / name))
        single(config, *overrides, "train.max_steps=2")
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two images that can be read, and one that cannot."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (90, 70, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.slow
def test_two_networks_side_by_side(
    runs: Path, faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Figures, numbers, MLflow; the same again to the byte."""
    panels: list[Any] = []
    drawn = explanation.features_figure
    monkeypatch.setattr(
        explanation, "features_figure", lambda p, *rest: (panels.extend(p), drawn(p, *rest))[1]
    )
    both = {"data": str(faces.root), "against": runs / "none", "count": 3}
    report = explain(runs / "affinity", tracked=True, output=tmp_path / "out", **both)
    assert json.loads((tmp_path / "out" / explanation.REPORT).read_bytes()) == report
    assert report["dataset"] == "synthetic" and report["split"] == "val"
    assert report["fingerprint"] == faces.fingerprint
    assert report["images"] == report["feature_images"] == 16
    assert report["fcn_loss"] == "affinity" and report["against"]["fcn_loss"] == "none"
    for found in (report, report["against"]):
        assert list(found["empty_maps"]) == ["head 1", "head 2", "fused"]
        assert 0 <= found["head_overlap"] <= 1 and found["class_separation"] > 0
        assert [face["true"] for face in found["faces"]] == list(faces.class_names[:3])
    assert [title.split("\n")[0] for title, _ in panels] == [
        "affinity/best.pt, affinity loss", "none/best.pt, no FCN loss",
    ]  # fmt: skip
    assert all(points.shape == (16, 2) and np.ptp(points) > 0 for _, points in panels)

    trained = load_trained(runs / "affinity")
    chosen = evenly(faces.split("val"), OVERLAP_IMAGES)
    world = World(0, 0, 1, 1, torch.device("cpu"))
    images = torch.cat(list(batches(trained, chosen, world)))
    maps = attention_maps(trained.network, images)[1][:, :2]
    overlaps = [head_overlap(own) for own in maps]
    assert report["head_overlap"] == pytest.approx(np.nanmean(overlaps), rel=1e-6)
    assert report["overlap_images"] == np.isfinite(overlaps).sum()

    again = explain(runs / "affinity", output=tmp_path / "again", **both)
    assert again == report

    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name='dan_dist'")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics == {
        "explain/head_overlap": report["head_overlap"],
        "explain/class_separation": report["class_separation"],
        "explain/head_overlap_against": report["against"]["head_overlap"],
        "explain/class_separation_against": report["against"]["class_separation"],
    }
    assert logged.data.tags["kind"] == "explanation"
    (used,) = logged.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("synthetic/val", faces.fingerprint[:32])
    pictures = {"attention.png", "attention-against.png", "features.png"}
    artifacts = {a.path for a in client.list_artifacts(logged.info.run_id)}
    assert artifacts >= {explanation.REPORT, *pictures}
    for picture in pictures:
        assert np.asarray(Image.open(tmp_path / "out" / picture)).std() > 10

    explain(runs / "affinity", data=str(faces.root), output=tmp_path / "again", weights="trained")
    assert (tmp_path / "again-2" / explanation.REPORT).is_file()

    # A later look without the other network leaves none of its figures.
    explain(runs / "affinity", data=str(faces.root), output=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == pictures - {
        "attention-against.png"
    }


@pytest.mark.slow
def test_given_images(runs: Path, photographs: Path, tmp_path: Path) -> None:
    """By the documented command; the broken one is named, left out, and fails it."""
    done = run(
        sys.executable, LAUNCH / "explain.py", runs / "affinity", "--no-tracking",
        photographs, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"left out {photographs}/broken.jpg: " in done.stdout
    output = runs / "affinity" / "best-explained-2-images"
    assert f"figures and explanation.json: {output}" in done.stdout
    report = json.loads((output / explanation.REPORT).read_bytes())
    assert [face["name"] for face in report["faces"]] == [
        f"{photographs}/0.png", f"{photographs}/1.png",
    ]  # fmt: skip
    assert [face["true"] for face in report["faces"]] == [None, None]
    assert list(report["unread"]) == [f"{photographs}/broken.jpg"]
    assert report["dataset"] is None and report["class_separation"] is None
    assert {p.name for p in output.iterdir()} == {"attention.png", explanation.REPORT}


def test_predictions_are_the_networks(
    runs: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = photographs / "0.png"
    prediction.main(PredictOptions(checkpoint=runs / "affinity", images=(given,), json=True))
    line = json.loads(capsys.readouterr().out)
    (face,) = explain(runs / "affinity", given)["faces"]
    assert face["predicted"] == line["class"]
    assert face["probability"] == pytest.approx(max(line["probabilities"].values()), abs=1e-5)


def test_baseline_where_maps_have_one_place(
    runs: Path, faces: ShardSet, photographs: Path, tmp_path: Path
) -> None:
    """Given images for the maps, shards for the features; all maps are empty, and named so."""
    given = photographs / "1.png"
    report = explain(runs / "baseline", given, data=str(faces.root), output=tmp_path / "out")
    assert report["heads"] == 0 and report["empty_maps"] == {"backbone": 1}
    assert report["head_overlap"] is None and report["overlap_images"] == 0
    assert report["faces"][0]["empty"] == ["backbone"]
    assert report["images"] == 1 and report["feature_images"] == 16
    assert report["class_separation"] > 0
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"attention.png", "features.png"}


def test_features_are_of_every_image_once_and_in_order(runs: Path, faces: ShardSet) -> None:
    """80 images, more than a batch, the last of which is padded; against each image alone."""
    trained = load_trained(runs / "baseline")
    split = faces.split("train")
    world = World(0, 0, 1, 1, torch.device("cpu"))
    features = pooled(trained, split, world)
    assert features.shape == (80, 128)
    for k in (0, 63, 64, 79):
        alone = replace(split, index=split.index[k : k + 1])
        (expected,) = pooled(trained, alone, world)
        assert np.allclose(features[k], expected, rtol=1e-4, atol=1e-5), k


def other_classes(runs: Path) -> Path:
    content = checkpoint.load(runs / "baseline" / "best.pt")
    content["class_names"][0] = "indifferent"
    torch.save(content, runs / "other.pt")
    return runs / "other.pt"


Case = Callable[[Path, Path, ShardSet], tuple[Path, list[Path], dict[str, Any]]]


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (lambda r, p, f: (r / "baseline", [], {}), "name images, or shards by --data"),
        (lambda r, p, f: (r / "baseline", [p], {"split": "val"}), "--split and --cache belong to"),
        (lambda r, p, f: (r / "baseline", [p], {"count": 0}), "--count 0: expected 1 to 100"),
        (lambda r, p, f: (r / "none.pt", [p], {}), r"none\.pt: no such checkpoint"),
        (lambda r, p, f: (r / "baseline", [p / "x"], {}), "x: no such file or folder"),
        (lambda r, p, f: (r / "baseline", [p / "broken.jpg"], {}), "none of 1 images could be rea"),
        (lambda r, p, f: (r / "baseline", [], {"data": str(f.root), "split": "test"}),
         "no split 'test', it has train, val"),
        (lambda r, p, f: (r / "baseline", [], {"data": str(f.root), "against": other_classes(r)}),
         r"other\.pt was trained on 8 classes \(indifferent"),
    ],
)  # fmt: skip
def test_an_explanation_is_refused_in_one_line(
    runs: Path, photographs: Path, faces: ShardSet, tmp_path: Path, case: Case, line: str
) -> None:
    path, given, options = case(runs, photographs, faces)
    with pytest.raises((ValueError, OSError), match=line):
        explain(path, *given, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_libraries_and_many_ranks_are_refused_in_one_line(
    runs: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def two_ranks(*_: object, **__: object) -> Iterator[tuple[World, None]]:
        yield World(0, 0, 2, 2, torch.device("cpu")), None

    monkeypatch.setattr(explanation, "session", two_ranks)
    with pytest.raises(ValueError, match="2 ranks: explain runs as one"):
        explain(runs / "baseline", photographs)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(OSError, match=r"pip install -e '\.\[explain\]'"):
        explain(runs / "baseline", photographs)
