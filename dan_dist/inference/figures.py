"""The figures of a look inside a network."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray


def attention_figure(faces: Sequence[Any], panels: Sequence[str], title: str) -> Figure:
    """A row a face: its classes, the image, and a map for each panel (paper, figure 1).

    A panel without any map, as all of these faces' are empty, is named beneath the title.

    faces: as `explanation.Face`, at least one.
    """
    drawn = [k for k in range(len(panels)) if any(face.maps[k].any() for face in faces)]
    if gone := [name for k, name in enumerate(panels) if k not in drawn]:
        title += f"\nempty for all of these faces, and left out: {', '.join(gone)}"
    panels = [panels[k] for k in drawn]
    words, side = 1.9, 1.35  # inches
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
        if face.note:
            lines.insert(0, face.note)
        row[0].text(0.98, 0.5, "\n".join(lines), ha="right", va="center", color=colour, fontsize=9)
        row[1].imshow(face.image)
        for axis, own in zip(row[2:], face.maps[drawn], strict=True):
            axis.imshow(face.image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
            if own.any():
                axis.imshow(own, cmap="turbo", vmin=0, vmax=1, alpha=0.5)
            else:
                axis.text(
                    0.5, 0.5, "empty", transform=axis.transAxes, ha="center", va="center",
                    backgroundcolor="white", fontsize=9,
                )  # fmt: skip
    if drawn:
        figure.colorbar(
            ScalarMappable(Normalize(0, 1), "turbo"), ax=axes, location="bottom", alpha=0.5,
            aspect=40, shrink=0.7, pad=0.01,
            label="Grad-CAM++ of the predicted class,\neach map divided by its largest value",
        )  # fmt: skip
    lines = [textwrap.fill(line, int(12 * width)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=11)
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
