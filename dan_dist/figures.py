"""The figures of a training run."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data import MEAN, STD


def confusion_figure(matrix: NDArray[np.int64], class_names: tuple[str, ...]) -> Figure:
    """The validation confusion matrix: colour is the share of the true class, text the images."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.6 * len(class_names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    accuracy = matrix.trace() / matrix.sum()
    axes.set(xlabel="predicted", ylabel="true", title=f"Validation, accuracy {accuracy:.2%}")
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
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
