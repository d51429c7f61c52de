"""The figures of an ablation."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


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
    spread = f", mean ± deviation over {runs} runs" if runs > 1 else ", one run"
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
