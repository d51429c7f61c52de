"""A look inside: Grad-CAM++ as its paper has it, numbers by hand, the program on real trainings."""

import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from conftest import DAN as TWO_HEADS
from conftest import REPOSITORY, TINY, run
from dan_dist.run import checkpoint
from dan_dist.inference import explain as explanation
from dan_dist.inference import predict as prediction
from dan_dist import train as story
from dan_dist.inference.attention import attention_maps
from dan_dist.config import load_config
from dan_dist.inference.metrics import class_separation, head_overlap
from dan_dist.model.dan import DAN
from shards.format import ShardSet
from dan_dist.model.weights import load_trained
from dan_dist.distributed.world import World


def heat(*pixels: int, shape: tuple[int, int] = (2, 5)) -> NDArray[np.float32]:
    """A map that is 1 at the numbered pixels, 0.5 at the last one, else 0."""
    flat = np.zeros(shape[0] * shape[1], np.float32)
    flat[list(pixels)] = 1
    flat[pixels[-1]] = 0.5
    return flat.reshape(shape)


def test_overlap_by_hand() -> None:
    """A fifth of ten pixels are two."""
    a, b, c = heat(0, 1), heat(1, 2), heat(8, 9)
    assert head_overlap(np.stack([a, a, a])) == 1
    assert head_overlap(np.stack([a, c])) == 0
    assert head_overlap(np.stack([a, b])) == pytest.approx(1 / 3)
    assert head_overlap(np.stack([a, b, c])) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert head_overlap(np.stack([a, 10 * a + 3])) == 1  # the scale says nothing


def test_overlap_of_maps_with_equal_values_or_none() -> None:
    a, flat = heat(0, 1), np.full((2, 5), 0.7, np.float32)
    assert head_overlap(np.stack([a, flat, a])) == 1
    assert np.isnan(head_overlap(np.stack([a, flat])))
    assert np.isnan(head_overlap(np.empty((0, 2, 5), np.float32)))
    # Four largest ones: the first two count; one pixel alone: the rest, which are least, do not.
    many, one = heat(0, 1, 2, 3, 4), heat(1)
    assert head_overlap(np.stack([many, a])) == 1
    assert head_overlap(np.stack([one, a])) == 1 / 2
    assert head_overlap(np.stack([one, heat(9)])) == 0


def test_separation_by_hand() -> None:
    """Means (0, 0), (6, 0), (0, 8), apart by 6, 8 and 10; images 1 from them, or 3."""
    features = np.array([[-1, 0], [1, 0], [6, -1], [6, 1], [0, 5], [0, 11]], np.float32)
    labels = np.array([0, 0, 5, 5, 2, 2])
    expected = ((6 + 8 + 10) / 3) / ((1 + 1 + 1 + 1 + 3 + 3) / 6)
    assert class_separation(features, labels) == pytest.approx(expected)
    assert class_separation(100 * features + 7, labels) == pytest.approx(expected)
    assert np.isnan(class_separation(features, np.zeros(6, int)))
    assert np.isnan(class_separation(np.ones((6, 2)), labels))


def test_images_are_taken_evenly(faces: ShardSet) -> None:
    split = faces.split("train")
    counts = np.bincount(split.index["label"])
    chosen = explanation.evenly(split, 32).index
    assert (np.bincount(chosen["label"]) == np.minimum(counts, 4)).all()
    assert len(np.unique(chosen)) == len(chosen)
    assert set(chosen["label"][:8]) == set(range(8))
    assert (chosen == explanation.evenly(split, 32).index).all()
    assert len(explanation.evenly(faces.split("val"), 2000)) == 16


def reference(network: DAN, images: Tensor) -> list[NDArray[np.float32]]:
    """Grad-CAM++ by equations 10 and 19 of arXiv 1710.11063 in float64: heads, then layer4.

    α = g² / (2 g² + Σ A · g³), w = Σ α · relu(g), map = relu(Σ w · A).
    """
    exact = DAN(network.classifier.out_features, len(network.heads)).double().eval()
    exact.load_state_dict(network.state_dict())
    outputs: list[Tensor] = []
    for layer in (*(head.spatial for head in exact.heads), exact.backbone.layer4):
        layer.register_forward_hook(lambda m, i, output: outputs.append(output))
    score = exact(images.double()).logits.max(dim=1).values.sum()
    if network.heads:  # layer4 runs first
        outputs = [*outputs[1:], outputs[0]]
    maps = []
    for a, g in zip(outputs, torch.autograd.grad(score, outputs), strict=True):
        alpha = g**2 / (2 * g**2 + a.sum(dim=(2, 3), keepdim=True) * g**3)
        weights = torch.where(g > 0, alpha * g, 0.0).sum(dim=(2, 3), keepdim=True)
        maps.append((weights * a).sum(dim=1).relu().detach().float().numpy())
    return maps


def enlarged(small: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """From the least value to the largest, bilinear, the largest 1."""
    large = cv2.resize((small - small.min()) / np.ptp(small), (side, side))
    return large / large.max()


@pytest.mark.parametrize(
    ("heads", "layout"),
    [(h, torch.contiguous_format) for h in (0, 1, 3)] + [(3, torch.channels_last)],
)
def test_maps_are_grad_cam_plus_plus(heads: int, layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    network = DAN(8, heads).eval()
    images = torch.randn(3, 3, 96, 96)
    expected = reference(network, images)
    placed = images.to(memory_format=layout)
    logits, maps = attention_maps(network.to(memory_format=layout), placed)
    assert maps.shape == (3, heads + 1, 96, 96) and maps.dtype == np.float32
    assert torch.allclose(logits, network(images).logits, rtol=1e-4, atol=1e-5)
    for panel, small in enumerate(expected):
        for k in range(3):
            assert np.abs(maps[k, panel] - enlarged(small[k], 96)).max() < 1e-4, (panel, k)
    # Nothing is left behind: no hook, no gradient.
    assert not any(m._forward_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_an_error_inside_is_not_lost() -> None:
    network = DAN(8, 1).eval()
    network.classifier.register_forward_hook(lambda m, i, o: [][0])
    with pytest.raises(IndexError) as caught:  # and holds on to all that was alive
        attention_maps(network, torch.randn(1, 3, 64, 64))
    assert not network.heads[0].spatial._forward_hooks, caught


def two_heads(first: int, second: int) -> DAN:
    """A network whose heads look where one colour (0 red, 1 green, 2 blue) is bright."""
    torch.manual_seed(0)
    network = DAN(4, 2).eval()
    patches = nn.Conv2d(3, 512, 32, stride=32)
    nn.init.zeros_(patches.weight)
    nn.init.uniform_(patches.bias, 0.5, 1.5)
    for colour in range(3):
        patches.weight.data[colour, colour] = 1 / 32**2
        patches.bias.data[colour] = 0
    network.backbone = nn.Sequential(OrderedDict(layer4=patches))
    for head, colour in zip(network.heads, (first, second), strict=True):
        for convolution in (m for m in head.spatial.modules() if isinstance(m, nn.Conv2d)):
            nn.init.zeros_(convolution.weight)
        head.spatial.reduce[0].weight.data[0, colour] = 1
        head.spatial.square[0].weight.data[0, 0, 1, 1] = 1
        nn.init.normal_(head.channel.gate[3].bias, std=2)  # vectors differ where the places do not
    return network


def test_heads_that_look_elsewhere_overlap_less() -> None:
    images = torch.zeros(1, 3, 160, 160)
    images[:, 0, :64, :64] = 1.0  # red above on the left, green below on the right
    images[:, 1, 96:, 96:] = 0.9
    _, same = attention_maps(two_heads(0, 0), images)
    _, apart = attention_maps(two_heads(0, 1), images)
    assert same[0, 0, :64, :64].mean() > 10 * same[0, 0, 96:, 96:].mean()
    assert apart[0, 1, 96:, 96:].mean() > 10 * apart[0, 1, :64, :64].mean()
    assert head_overlap(same[0, :2]) > 0.9
    assert head_overlap(apart[0, :2]) < 0.1


def test_heads_that_do_the_same_have_empty_maps() -> None:
    """Over equal heads the log-softmax has no gradient; the backbone's, their sum, has none too."""
    network = two_heads(0, 0)
    network.heads[1].load_state_dict(network.heads[0].state_dict())
    _, maps = attention_maps(network, torch.rand(2, 3, 96, 96))
    assert not maps.any() and np.isnan(head_overlap(maps[0, :2]))


def test_features_in_one_point_are_drawn_there() -> None:
    assert (explanation.project(np.ones((5, 512), np.float32)) == 0).all()
    assert np.isfinite(explanation.project(np.eye(2, 512, dtype=np.float32))).all()


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
        story.main(load_config(config, [*overrides, "train.max_steps=2"]))
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


def test_two_networks_side_by_side(
    runs: Path, faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures, numbers, MLflow; the same again to the byte."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    panels: list[Any] = []
    drawn = explanation.features_figure
    monkeypatch.setattr(
        explanation, "features_figure", lambda p, *rest: (panels.extend(p), drawn(p, *rest))[1]
    )
    report = explanation.main(
        runs / "affinity", data=str(faces.root), against=runs / "none", count=3,
        output=tmp_path / "out",
    )  # fmt: skip
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
    chosen = explanation.evenly(faces.split("val"), explanation.OVERLAP_IMAGES)
    world = World(0, 0, 1, 1, torch.device("cpu"))
    images = torch.cat(list(explanation.batches(trained, chosen, faces.image_size, world)))
    maps = attention_maps(trained.network, images)[1][:, :2]
    overlaps = [head_overlap(own) for own in maps]
    assert report["head_overlap"] == pytest.approx(np.nanmean(overlaps), rel=1e-6)
    assert report["overlap_images"] == np.isfinite(overlaps).sum()

    again = explanation.main(
        runs / "affinity", data=str(faces.root), against=runs / "none", count=3,
        output=tmp_path / "again", tracked=False,
    )  # fmt: skip
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
    pictures = {"attention.png", "attention-against.png", "features.png"}
    artifacts = {a.path for a in client.list_artifacts(logged.info.run_id)}
    assert artifacts >= {explanation.REPORT, *pictures}
    for picture in pictures:
        assert np.asarray(Image.open(tmp_path / "out" / picture)).std() > 10

    # A later look without the other network leaves none of its figures.
    explanation.main(
        runs / "affinity", data=str(faces.root), output=tmp_path / "out", tracked=False
    )
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == pictures - {
        "attention-against.png"
    }


def test_given_images(runs: Path, photographs: Path, tmp_path: Path) -> None:
    """By the documented command; the broken one is named, left out, and fails it."""
    done = run(
        sys.executable, REPOSITORY / "launch" / "explain.py", runs / "affinity", "--no-tracking",
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
    given = [photographs / "0.png"]
    prediction.main(runs / "affinity", given, as_json=True)
    said = json.loads(capsys.readouterr().out)
    (face,) = explanation.main(runs / "affinity", given, tracked=False)["faces"]
    assert face["predicted"] == said["class"]
    assert face["probability"] == pytest.approx(max(said["probabilities"].values()), abs=1e-5)


def test_baseline_where_maps_have_one_place(
    runs: Path, faces: ShardSet, photographs: Path, tmp_path: Path
) -> None:
    """Given images for the maps, shards for the features; all maps are empty, and said to be."""
    given = [photographs / "1.png"]
    report = explanation.main(
        runs / "baseline", given, data=str(faces.root), output=tmp_path / "out", tracked=False
    )
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
    features = explanation.pooled(trained, split, faces.image_size, world)
    assert features.shape == (80, 512)
    for k in (0, 63, 64, 79):
        alone = replace(split, index=split.index[k : k + 1])
        (expected,) = explanation.pooled(trained, alone, faces.image_size, world)
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
def test_what_cannot_be_explained_is_said_in_one_line(
    runs: Path, photographs: Path, faces: ShardSet, tmp_path: Path, case: Case, line: str
) -> None:
    path, given, options = case(runs, photographs, faces)
    with pytest.raises((ValueError, OSError), match=line):
        explanation.main(path, given, output=tmp_path / "out", tracked=False, **options)
    assert not (tmp_path / "out").exists()


def test_missing_libraries_and_many_ranks_are_said_in_one_line(
    runs: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def two_ranks(*_: object, **__: object) -> Iterator[tuple[World, None]]:
        yield World(0, 0, 2, 2, torch.device("cpu")), None

    monkeypatch.setattr(explanation, "joined", two_ranks)
    with pytest.raises(ValueError, match="2 ranks: explain runs as one"):
        explanation.main(runs / "baseline", [photographs], tracked=False)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(OSError, match=r"pip install -e '\.\[explain\]'"):
        explanation.main(runs / "baseline", [photographs], tracked=False)
