"""Figures: what they say of whose images, and that nothing in them hides anything else."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dan_dist.data.crops import pack_images
from dan_dist.evaluation.figures import confusion_figure, mistakes_figure, reliability_figure
from dan_dist.evaluation.judge import Mistake, judge_classes
from dan_dist.evaluation.metrics import calibrate
from dan_dist.inference.explanation import Face
from dan_dist.inference.figures import attention_figure
from dan_dist.inference.inputs import given_faces
from dan_dist.model.weights import load_trained
from shards.format import ShardSet

TITLE = "affectnet8, epoch 12, on AffectNet-8, split 'val'"


@pytest.fixture(autouse=True)
def closed() -> object:
    yield
    plt.close("all")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_a_class_without_images_is_not_one_that_is_all_wrong() -> None:
    matrix = np.array([[90, 10, 0], [0, 0, 0], [4, 0, 0]])
    figure = confusion_figure(matrix, ("happy", "absent", "wrong"), TITLE)
    axis = figure.axes[0]
    assert texts(figure) == ["90\n90.0%", "10\n10.0%", "0", "4\n100.0%", "0", "0", "no images"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["happy (100)", "absent (0)",
                                                              "wrong (4)"]  # fmt: skip
    (hatched,) = axis.patches
    assert hatched.get_hatch() and hatched.get_y() == 0.5
    title = " ".join(axis.get_title().split())
    assert title == f"{TITLE} accuracy 86.54% of 104 images"


def test_the_legend_of_a_reliability_diagram_covers_nothing() -> None:
    rows = np.random.default_rng(0).dirichlet(np.full(8, 0.3), 400).astype(np.float32)
    figure = reliability_figure(calibrate(rows, rows.argmax(axis=1)), TITLE)
    figure.canvas.draw()
    (legend,) = figure.legends
    own = legend.get_window_extent()
    assert len(legend.get_texts()) == 3
    for axis in figure.axes:
        assert axis.get_legend() is None and not own.overlaps(axis.get_tightbbox())
    assert figure.bbox.x0 <= own.x0 and own.x1 <= figure.bbox.x1


def test_no_panel_is_empty(faces: ShardSet) -> None:
    """As many panels as mistakes; without any, no figure; maps that are all empty are named."""
    image = Image.new("RGB", (32, 32))
    for count in (1, 4, 7):
        mistakes = [Mistake("k", "happy", "sad", 0.9)] * count
        figure = mistakes_figure([image] * count, mistakes, TITLE)
        (axis,) = figure.axes
        places = {tuple(image.get_extent()) for image in axis.images}
        assert len(places) == len(axis.images) == count
        assert sum("taken for sad" in text for text in texts(figure)) == count
        assert all(axis.viewLim.contains(*text.get_position()) for text in axis.texts)
        assert all(axis.viewLim.contains(x, y) for place in places for x in place[:2]
                   for y in place[2:])  # fmt: skip
    narrow = mistakes_figure([Image.new("RGB", (10, 40))], mistakes[:1], TITLE)
    left, right, bottom, top = narrow.axes[0].images[0].get_extent()
    assert bottom - top == pytest.approx(4 * (right - left))
    split = faces.split("val")
    right = np.eye(8, dtype=np.float32)[split.index["label"]]
    names = [figure.name for figure in judge_classes(right, split, TITLE).details().figures]
    assert names == ["confusion_matrix.png", "reliability.png"]

    maps = np.zeros((3, 8, 8), np.float32)
    maps[1] = 1
    face = Face("a.png", "a.png", np.zeros((8, 8, 3), np.float32), None, "happy", 0.9, maps)
    figure = attention_figure([face], ["head 1", "head 2", "fused"], "where it looks")
    assert "left out: head 1, fused" in figure.get_suptitle()
    assert [axis.get_title() for axis in figure.axes[:3]] == ["", "image", "head 2"]
    nothing = face._replace(maps=np.zeros((3, 8, 8), np.float32))
    assert "head 2" in attention_figure([nothing], ["head 1", "head 2", "f"], "").get_suptitle()


def test_given_images_have_their_names_and_what_was_done_to_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"a face.png": (90, 70), "square.png": (64, 64), f"{'long' * 20}.png": (101, 100)}
    for name, size in sizes.items():
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
    found = given_faces([tmp_path], tmp_path, 32, 1)
    assert found.notes[0] == "a face.png\n90×70, made square"
    assert found.notes[1].startswith("longlong") and "…" in found.notes[1]
    assert len(found.notes[1]) == 24 and "made square" not in found.notes[1]
    assert found.notes[2] == "square.png"
    assert "1 images are no squares" in caplog.text and "a face.png, 90×70 pixels" in caplog.text
    image = np.zeros((8, 8, 3), np.float32)
    face = Face("x", found.notes[0], image, None, "happy", 0.9, np.ones((1, 8, 8), np.float32))
    (told, *_) = texts(attention_figure([face], ["fused"], ""))
    assert told.splitlines() == ["a face.png", "90×70, made square", "predicted: happy",
                                 "90.0% sure"]  # fmt: skip


def test_a_checkpoint_names_its_epoch(baseline_run: Path, tmp_path: Path) -> None:
    assert load_trained(baseline_run).age == "epoch 1"
    (step,) = baseline_run.glob("step-*05.pt")
    assert load_trained(step).age == "step 5"
    with Image.new("RGB", (40, 40)) as image:
        image.save(tmp_path / "1.png")
    (own,) = pack_images([tmp_path / "1.png"], tmp_path, size=32, threads=1).given
    assert own.changed is None and own.box is None
