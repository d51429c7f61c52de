"""The judge of each task: what an evaluation finds, from the network's output for every image."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dan_dist.data.mixture import JoinedSplit, bounds_of
from dan_dist.data.reader import Reader
from dan_dist.evaluation.figures import (
    confusion_figure,
    mistakes_figure,
    reliability_figure,
    verification_figure,
)
from dan_dist.evaluation.intervals import (
    METHOD,
    Interval,
    format_figures,
    intervals,
    of_mean,
)
from dan_dist.evaluation.metrics import (
    calibrate,
    class_scores,
    confusion,
    cross_entropy,
    format_metrics,
    summarise,
)
from dan_dist.evaluation.verification import Pairs, similarities, verify
from shards.format import Split

MISTAKES = 24  # of the most confident ones
WHOLE = ("accuracy", "mean_recall", "macro_f1")  # figures of all classes together

Rows = NDArray[np.float32]  # (images, D): the selected part of the network's output


class LazyFigure(NamedTuple):
    """A figure that is not drawn yet."""

    name: str  # of its file
    draw: Callable[..., Figure]  # of the values and a title
    values: tuple[Any, ...]
    title: str


class Details(NamedTuple):
    """The part of a result that a report holds and a training does not need."""

    values: dict[str, Any]  # plain ones, for the JSON file
    metrics: dict[str, float]  # for MLflow
    figures: tuple[LazyFigure, ...]
    lines: list[str]  # for the log


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation of a network."""

    metrics: dict[str, float]  # one of them chooses the best
    right: NDArray[np.bool_]  # of each image, or pair
    figure: LazyFigure  # the one that a training draws of its best
    details: Callable[[], Details]  # computed when called
    loss: float | None = None  # cross-entropy, where classes are judged


class Mistake(NamedTuple):
    """An image that the network takes for another class."""

    key: str  # <shard>/<key>
    true: str
    predicted: str
    confidence: float


def judge_classes(rows: Rows, split: Split, title: str) -> EvaluationResult:
    """How well (images, classes) probabilities name each image's class."""
    labels, names = split.index["label"], split.class_names
    matrix = confusion(rows, labels)
    figure = LazyFigure("confusion_matrix.png", confusion_figure, (matrix, names), title)
    return EvaluationResult(
        summarise(matrix, names),
        rows.argmax(axis=1) == labels,
        figure,
        partial(_class_details, rows, split, title, matrix, figure),
        cross_entropy(rows, labels),
    )


def judge_sets(rows: Rows, split: JoinedSplit, title: str) -> EvaluationResult:
    """As `judge_classes`, but what is of all classes is the mean of each set's."""
    whole, labels = judge_classes(rows, split, title), split.index["label"]
    found = [
        summarise(confusion(rows[own], labels[own]), split.class_names) for own in bounds_of(split)
    ]
    metrics = dict(whole.metrics)
    for key in WHOLE:
        metrics[key] = float(np.mean([own[key] for own in found]))
        named = zip(split.sets, found, strict=True)
        metrics |= {f"{key}_{name}": own[key] for name, own in named}
    return replace(whole, metrics=metrics)


def find_intervals(rows: Rows, split: Split) -> dict[str, Interval]:
    """The interval of each figure that the judge of a split gives; of several sets, of their means.

    Of several, each set's own as well, after its name.
    """
    labels, names = split.index["label"], split.class_names
    whole = intervals(confusion(rows, labels), names)
    if not isinstance(split, JoinedSplit):
        return whole
    matrices = [confusion(rows[own], labels[own]) for own in bounds_of(split)]
    figures = [summarise(m, names) for m in matrices]
    found = [intervals(m, names) for m in matrices]
    for key in WHOLE:
        own = [ends[key] for ends in found]
        whole[key] = of_mean([own_figures[key] for own_figures in figures], own)
        whole |= {f"{key}_{name}": ends for name, ends in zip(split.sets, own, strict=True)}
    return whole


def _class_details(
    rows: Rows, split: Split, title: str, matrix: NDArray[np.int64], first: LazyFigure
) -> Details:
    """Each class's scores, intervals, the calibration, the surest mistakes."""
    labels, names = split.index["label"], split.class_names
    scores, calibration = class_scores(matrix, names), calibrate(rows, labels)
    summary, found = summarise(matrix, names), intervals(matrix, names)
    whole = {**{key: summary[key] for key in WHOLE}, "calibration_error": calibration.error}
    metrics = dict(whole)
    for name, own in scores.items():
        metrics |= {f"{key}/{name}": own[key] for key in ("precision", "recall", "f1")}
    samples = surest_mistakes(rows, labels)
    mistakes = [
        Mistake(split.key(k), names[labels[k]], names[rows[k].argmax()], float(rows[k].max()))
        for k in samples
    ]
    values = {
        **whole,
        "intervals": found,
        "intervals_method": METHOD,
        "classes": scores,
        "confusion_matrix": matrix.tolist(),
        "calibration": {
            "images": calibration.images.tolist(),
            "confidence": calibration.confidence.tolist(),
            "accuracy": calibration.accuracy.tolist(),
        },
        "mistakes": [mistake._asdict() for mistake in mistakes],
    }
    figures = [first, LazyFigure("reliability.png", reliability_figure, (calibration,), title)]
    if mistakes:
        shown = (split, samples, mistakes)
        figures.append(LazyFigure("mistakes.png", _draw_mistakes, shown, title))
    error = f"calibration error {100 * calibration.error:.2f} %"
    lines = [
        *_score_lines(scores),
        f"{format_figures(summary, found)}, {error}, {len(labels)} images",
        f"in brackets: {METHOD}",
    ]
    return Details(values, metrics, tuple(figures), lines)


def judge_pairs(rows: Rows, pairs: Pairs, title: str) -> EvaluationResult:
    """How well (images, D) features separate pairs of one person from pairs of two."""
    similarity = similarities(rows, pairs)
    found = verify(similarity, pairs)
    figure = LazyFigure("roc.png", verification_figure, (found, similarity, pairs), title)
    count = len(pairs.same)
    details = Details(
        {"pairs": count, **found.metrics},
        found.metrics,
        (figure,),
        [f"{format_metrics(found.metrics)}, {count} pairs"],
    )
    return EvaluationResult(found.metrics, found.right, figure, lambda: details)


def surest_mistakes(rows: Rows, labels: NDArray[np.integer]) -> list[int]:
    """The wrongly classified images of which the network is surest, at most MISTAKES, in order."""
    wrong = np.flatnonzero(rows.argmax(axis=1) != labels)
    surest = np.argsort(-rows[wrong].max(axis=1), kind="stable")
    return [int(k) for k in wrong[surest[:MISTAKES]]]


def _draw_mistakes(
    split: Split, samples: Sequence[int], mistakes: Sequence[Mistake], title: str
) -> Figure:
    return mistakes_figure(read_images(split, samples), mistakes, title)


def read_images(split: Split, samples: Sequence[int]) -> list[Image.Image]:
    """Images of a split as they are."""
    reader = Reader(split, max_bad=0)
    images = [Image.open(io.BytesIO(reader.read(k).tobytes())).convert("RGB") for k in samples]
    reader.close()
    return images


def _score_lines(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Each class's scores as lines of a table."""
    width = max(map(len, scores))
    return [
        f"{'':{width}}  precision  recall      F1  images",
        *(
            f"{name:{width}}  {100 * s['precision']:8.2f} %  {100 * s['recall']:5.2f} %  "
            f"{s['f1']:.4f}  {s['images']:6d}"
            for name, s in scores.items()
        ),
    ]
