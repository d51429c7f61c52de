"""The figures of a training, of an evaluation, of an ablation and of a look inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dan_dist.metrics import BINS, Calibration
from dan_dist.model import MEAN, STD
from dan_dist.verification import FAR, Pairs, Verification


def save(figure: Figure, path: Path) -> None:
    """Writes a figure and frees it."""
    figure.savefig(path)
    plt.close(figure)


def confusion_figure(
    matrix: NDArray[np.int64], class_names: tuple[str, ...], title: str = "Validation"
) -> Figure:
    """A confusion matrix: colour is the share of the true class, text the images."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.6 * len(class_names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    accuracy = matrix.trace() / matrix.sum()
    axes.set(xlabel="predicted", ylabel="true", title=f"{title}, accuracy {accuracy:.2%}")
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    return figure


def verification_figure(
    found: Verification, similarity: NDArray[np.float64], pairs: Pairs, title: str = "Verification"
) -> Figure:
    """The ROC over false accept rates in powers of ten, beside the pairs' similarities."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    impostors = int((~pairs.same).sum())
    # A rate of 0 has no place on this axis: it is drawn where less than one pair would stand
    left.step(np.maximum(found.false_accepts, 0.5 / impostors), found.true_accepts, where="post")
    left.axvline(FAR, color="gray", linestyle=":", label=f"false accept rate {FAR:g}")
    left.set(
        xscale="log", xlim=(0.5 / impostors, 1), ylim=(0, 1.01),
        xlabel=f"false accept rate, of {impostors} pairs of two persons",
        ylabel=f"true accept rate, of {int(pairs.same.sum())} pairs of one",
        title=f"ROC, area {found.metrics['auc']:.2%}",
    )  # fmt: skip
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    bins = np.linspace(similarity.min(), similarity.max(), 51)
    for name, own in (("one person", pairs.same), ("two persons", ~pairs.same)):
        right.hist(similarity[own], bins, alpha=0.6, label=name)
    right.set(
        xlabel="cosine of the features", ylabel="pairs",
        title=f"accuracy {found.metrics['accuracy']:.2%}, mean over folds",
    )  # fmt: skip
    right.legend()
    figure.suptitle(title)
    return figure


def images_figure(images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Figure:
    """Up to 32 training images (n, 3, S, S) as the network sees them, under their class names."""
    count = min(len(images), 32)
    columns = min(count, 8)
    rows = -(-count // columns)
    pixels = images[:count].permute(0, 2, 3, 1).float().cpu().numpy() * STD + MEAN
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 * columns, 1.6 * rows + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for k, axis in enumerate(axes.flat):
        axis.axis("off")
        if k < count:
            axis.imshow(pixels[k].clip(0, 1))
            axis.set_title(class_names[int(labels[k])], fontsize=9)
    figure.suptitle("Training images, augmented")
    return figure


def reliability_figure(calibration: Calibration, title: str) -> Figure:
    """Accuracy against confidence (Guo et al. 2017), above the number of images in each bin."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(5.5, 6), height_ratios=[3, 1], sharex=True, layout="constrained"
    )
    centres = (np.arange(BINS) + 0.5) / BINS
    filled = calibration.images > 0
    above.plot([0, 1], [0, 1], "--", color="gray", label="calibrated")
    above.bar(
        centres[filled], calibration.accuracy[filled], 1 / BINS, edgecolor="white",
        label="accuracy of the bin's images",
    )  # fmt: skip
    above.plot(
        calibration.confidence[filled], calibration.accuracy[filled], "o", color="black",
        markersize=4, label="at their mean confidence",
    )  # fmt: skip
    error = f"expected calibration error {calibration.error:.2%}"
    above.set(ylabel="accuracy", ylim=(0, 1), title=f"{title}\n{error}")
    above.legend(loc="upper left")
    below.bar(centres, calibration.images, 1 / BINS, edgecolor="white", color="gray")
    below.set(xlabel="confidence of the predicted class", ylabel="images", xlim=(0, 1))
    return figure


def mistakes_figure(images: Sequence[Image.Image], mistakes: Sequence[Any], title: str) -> Figure:
    """Wrongly classified images under their true and predicted class and the confidence.

    mistakes: as `evaluation.Mistake`, one an image.
    """
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.3 * rows + 0.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, mistake in zip(axes.flat, images, mistakes, strict=False):
        axis.imshow(image)
        axis.set_title(
            f"{mistake.true}\ntaken for {mistake.predicted}\n{mistake.confidence:.1%} sure",
            fontsize=9,
        )
    figure.suptitle(f"{title}: {'the surest mistakes' if images else 'no mistakes'}")
    return figure


def accuracy_figure(
    rows: Sequence[Mapping[str, Any]], axes: Sequence[str], name: str, judged: str
) -> Figure:
    """Accuracy against the first axis (figure 5 of the paper, where that is the heads).

    rows: as `comparison.table` gives them; a line for each combination of the other axes.
    """
    done = [row for row in rows if row["finished"]]
    values = list(dict.fromkeys(row[axes[0]] for row in done))
    numeric = all(_is_number(value) for value in values)
    places = {v: float(v) if numeric else float(k) for k, v in enumerate(values)}
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    runs = max((row["finished"] for row in done), default=0)
    others = [tuple(row[a] for a in axes[1:]) for row in done]
    for number, other in enumerate(dict.fromkeys(others)):
        own = [row for row, o in zip(done, others, strict=True) if o == other]
        prefix = ", ".join(f"{a} {v}" for a, v in zip(axes[1:], other, strict=True))
        for kind, style in (("last", "o-"), ("best", "s:")):
            axis.errorbar(
                [places[row[axes[0]]] for row in own],
                [row[f"{kind}_accuracy"] for row in own],
                [row[f"{kind}_accuracy_deviation"] for row in own] if runs > 1 else None,
                fmt=style if numeric else style[0], capsize=4, color=f"C{number}",
                alpha=1.0 if kind == "last" else 0.5,
                label=f"{prefix + ': ' if prefix else ''}{kind} epoch",
            )  # fmt: skip
    axis.set_xticks(list(places.values()), values)
    spread = f", mean ± deviation over {runs} seeds" if runs > 1 else ", one seed"
    axis.set(
        xlabel=axes[0], ylabel=f"accuracy on {judged}, %",
        title=f"Ablation {name}{spread}",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def curves_figure(
    runs: Sequence[tuple[str, Mapping[str, Sequence[tuple[int, float]]]]], name: str
) -> Figure:
    """Training loss and validation accuracy of all runs, a colour for each setting.

    runs: (setting, metric → (step, value)), one a run.
    """
    settings = list(dict.fromkeys(setting for setting, _ in runs))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(settings)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for setting, curves in runs:
        colour = colours[settings.index(setting)]
        for axis, key, factor, style in (
            (left, "train/loss", 1, "-"), (right, "val/accuracy", 100, "o-")
        ):  # fmt: skip
            points = np.array(curves.get(key, [])).reshape(-1, 2)
            axis.plot(points[:, 0], factor * points[:, 1], style, color=colour, markersize=4)
    left.set(xlabel="step", ylabel="training loss", title=f"Ablation {name}: training loss")
    right.set(xlabel="step", ylabel="accuracy, %", title=f"Ablation {name}: validation accuracy")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    handles = [Line2D([], [], color=c, label=s) for c, s in zip(colours, settings, strict=True)]
    figure.legend(handles=handles, loc="outside right center")
    return figure


def attention_figure(faces: Sequence[Any], panels: Sequence[str], title: str) -> Figure:
    """A row a face: what is said of it, the image, and a map for each panel (paper, figure 1).

    faces: as `explanation.Face`, at least one.
    """
    words, side = 1.4, 1.35  # inches
    width = max(words + side * (1 + len(panels)), 6.0)
    figure, axes = plt.subplots(
        len(faces), 2 + len(panels), figsize=(width, side * len(faces) + 1.5), squeeze=False,
        width_ratios=[words / side, *[1] * (1 + len(panels))],
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0),
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes[0], ("", "image", *panels), strict=True):
        axis.set_title(name, fontsize=10)
    for row, face in zip(axes, faces, strict=True):
        lines = [f"predicted: {face.predicted}", f"{face.probability:.1%} sure"]
        colour = "black"
        if face.true is not None:
            lines.insert(0, f"true: {face.true}")
            colour = "darkgreen" if face.true == face.predicted else "firebrick"
        row[0].text(0.98, 0.5, "\n".join(lines), ha="right", va="center", color=colour, fontsize=9)
        row[1].imshow(face.image)
        for axis, own in zip(row[2:], face.maps, strict=True):
            axis.imshow(face.image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
            if own.any():
                axis.imshow(own, cmap="turbo", vmin=0, vmax=1, alpha=0.5)
            else:
                axis.text(
                    0.5, 0.5, "empty", transform=axis.transAxes, ha="center", va="center",
                    backgroundcolor="white", fontsize=9,
                )  # fmt: skip
    figure.colorbar(
        ScalarMappable(Normalize(0, 1), "turbo"), ax=axes, location="bottom", alpha=0.5,
        aspect=40, shrink=0.7, pad=0.01,
        label="Grad-CAM++ of the predicted class,\neach map divided by its largest value",
    )  # fmt: skip
    figure.suptitle(title, fontsize=11)
    return figure


def features_figure(
    panes: Sequence[tuple[str, NDArray[np.float32]]],
    labels: NDArray[np.integer],
    class_names: tuple[str, ...],
    title: str,
) -> Figure:
    """Images as points, coloured by class (paper, figure 3), a pane for each network.

    panes: (heading, (images, 2) points); labels: (images,).
    """
    figure, axes = plt.subplots(
        1, len(panes), figsize=(5.2 * len(panes) + 1.6, 5.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    few = len(class_names) <= 10
    places = np.arange(len(class_names)) / (10 if few else len(class_names))
    colours = plt.get_cmap("tab10" if few else "nipy_spectral")(places)
    for axis, (heading, points) in zip(axes[0], panes, strict=True):
        # one call: points of all classes are drawn in the images' order, none over all others
        axis.scatter(*points.T, s=9, c=colours[labels], linewidths=0)
        axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axis.set_title(heading, fontsize=10)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=c, label=n)
        for c, n in zip(colours, class_names, strict=True)
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
