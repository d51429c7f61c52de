"""The figures of a training and of its evaluations."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dan_dist.data.augment import MEAN, STD
from dan_dist.evaluation.metrics import BINS, Calibration
from dan_dist.evaluation.verification import FAR, Pairs, Verification


def confusion_figure(matrix: NDArray[np.int64], class_names: tuple[str, ...], title: str) -> Figure:
    """A confusion matrix: colour and per cents are shares of the true class, above them images.

    A class without images is a hatched row; one that is all wrong has its shares, and 0 in place.
    """
    totals = matrix.sum(axis=1)
    shares = matrix / np.maximum(totals, 1)[:, None]
    side = 2.8 + 0.62 * len(class_names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    named = [f"{name} ({count:,})" for name, count in zip(class_names, totals, strict=True)]
    axes.set_yticks(range(len(class_names)), named)
    accuracy = f"accuracy {matrix.trace() / matrix.sum():.2%} of {matrix.sum():,} images"
    axes.set(xlabel="predicted", ylabel="true (images)")
    axes.set_title(f"{_fit(title, side)}\n{accuracy}", fontsize=10)
    for (row, column), count in np.ndenumerate(matrix):
        if totals[row]:
            share, color = shares[row, column], "white" if shares[row, column] > 0.5 else "black"
            text = f"{count:,}\n{share:.1%}" if count else "0"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8,
                      in_layout=False)  # which is inside the axes  # fmt: skip
    for row in np.flatnonzero(totals == 0).tolist():
        axes.add_patch(Rectangle((-0.5, row - 0.5), len(class_names), 1, facecolor="0.9",
                                 edgecolor="0.7", hatch="///"))  # fmt: skip
        axes.text((len(class_names) - 1) / 2, row, "no images", ha="center", va="center",
                  backgroundcolor="0.9", fontsize=8)  # fmt: skip
    return figure


def _fit(title: str, width: float) -> str:
    """A title in lines of this width in inches."""
    return textwrap.fill(title, int(13 * width))


def verification_figure(
    found: Verification, similarity: NDArray[np.float64], pairs: Pairs, title: str
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
    shown = images[:32].permute(0, 2, 3, 1).float().cpu().numpy() * STD + MEAN
    captions = [class_names[int(label)] for label in labels[:32]]
    return _gallery(list(shown.clip(0, 1)), captions, "Training images, augmented", 8, 1.4)


def _gallery(
    images: Sequence[Any], captions: Sequence[str], title: str, columns: int, side: float
) -> Figure:
    """Images in rows of `columns`, each under its caption; side: of an image's place, in inches.

    One pair of axes, in inches, holds them all: axes for each image take a second to lay out.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    captions = ["\n".join(textwrap.fill(line, int(12 * side)) for line in own.split("\n"))
                for own in captions]  # fmt: skip
    words = 0.16 * max(own.count("\n") + 1 for own in captions) + 0.08  # a caption's height
    width = max(side * columns, 5.0)
    title = "\n".join(_fit(line, width) for line in title.split("\n"))
    top = 0.22 * (title.count("\n") + 1) + 0.15
    height = top + rows * (side + words)
    left, largest = (width - side * columns) / 2, side / 2 - 0.05
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = left + (k % columns + 0.5) * side  # the middle of its upper edge
        y = top + words + k // columns * (side + words)
        pixels = np.asarray(image)
        half = largest / max(pixels.shape[:2])
        dy, dx = half * pixels.shape[0], half * pixels.shape[1]
        middle = y + side / 2
        axes.imshow(pixels, extent=(x - dx, x + dx, middle + dy, middle - dy))
        axes.text(x, y, caption, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.text(width / 2, 0.08, title, ha="center", va="top", fontsize=11)
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
        markersize=4, clip_on=False, label="at their mean confidence",
    )  # fmt: skip
    error = f"expected calibration error {calibration.error:.2%}"
    above.set(ylabel="accuracy", ylim=(0, 1))
    above.set_title(f"{_fit(title, 5)}\n{error}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    below.bar(centres, calibration.images, 1 / BINS, edgecolor="white", color="gray")
    below.set(xlabel="confidence of the predicted class", ylabel="images", xlim=(0, 1))
    return figure


def mistakes_figure(images: Sequence[Image.Image], mistakes: Sequence[Any], title: str) -> Figure:
    """Wrongly classified images under their true and predicted class and the confidence.

    images: at least one; mistakes: as `judge.Mistake`, one an image.
    """
    captions = [
        f"{own.true}\ntaken for {own.predicted}\n{own.confidence:.1%} sure" for own in mistakes
    ]
    return _gallery(images, captions, f"{title}\nthe surest mistakes", 6, 1.9)


def groups_figure(columns: Mapping[str, Any], title: str) -> Figure:
    """Each group's accuracy, mean recall and macro-F1 with their intervals, a panel a column.

    columns: as `groups.judge_groups` gives them.
    """
    heights = [len(own["groups"]) for own in columns.values()]
    figure, panels = plt.subplots(
        len(columns), 1, figsize=(8, 1.4 * len(columns) + 0.42 * sum(heights) + 0.8),
        height_ratios=[h + 1 for h in heights], squeeze=False, layout="constrained", sharex=True,
    )  # fmt: skip
    for axis, (column, own) in zip(panels[:, 0], columns.items(), strict=True):
        names = list(own["groups"])
        for k, (key, marker) in enumerate((("accuracy", "o"), ("mean_recall", "s"),
                                           ("macro_f1", "^"))):  # fmt: skip
            values = np.array([own["groups"][n][key] for n in names])
            ends = np.array([own["groups"][n]["intervals"][key] for n in names])
            spread = np.abs(ends - values[:, None]).T
            places = np.arange(len(names)) + 0.22 * (k - 1)
            axis.errorbar(
                100 * values, places, xerr=100 * spread, fmt=marker, capsize=3,
                label=key.replace("_", " "),
            )  # fmt: skip
        images = [f"{n} ({own['groups'][n]['images']})" for n in names]
        axis.set_yticks(range(len(names)), images)
        axis.set_ylim(len(names) - 0.5, -0.5)
        gap = own["widest_gap"]
        axis.set_title(
            f"{column}: widest gap {100 * gap['accuracy']:.1f} points of accuracy, "
            f"{gap['from']} to {gap['to']}", fontsize=10,
        )  # fmt: skip
        axis.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("%, with 95 % intervals; in brackets: images")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(title)
    return figure


def matrix_figure(
    tables: Mapping[str, NDArray[np.float64]], rows: Sequence[str], columns: Sequence[str]
) -> Figure:
    """What each network reaches on each data set, a panel a metric: train × test.

    tables: metric → (networks, sets) shares.
    """
    side = 1.1 * len(columns) + 1.2
    figure, panels = plt.subplots(
        1, len(tables), figsize=(side * len(tables) + 2.5, 0.8 * len(rows) + 2.2),
        squeeze=False, layout="constrained", sharey=True,
    )  # fmt: skip
    for axis, (metric, values) in zip(panels[0], tables.items(), strict=True):
        image = axis.imshow(100 * values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(metric.replace("_", " "))
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.5 else "black"
            axis.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=color)
    panels[0, 0].set_ylabel("trained: run")
    figure.supxlabel("judged on")
    figure.colorbar(image, ax=panels, label="%")
    return figure
