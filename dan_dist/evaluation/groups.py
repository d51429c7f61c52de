"""The figures of an evaluation for each group of images: of an age, a gender, a source.

A group's network may fail while the whole set's figures look well; the widest gap names the two
groups that differ most.
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.evaluation.figures import groups_figure
from dan_dist.evaluation.intervals import intervals
from dan_dist.evaluation.judge import WHOLE, Details, LazyFigure, Rows
from dan_dist.evaluation.metrics import confusion, summarise
from dan_dist.evaluation.records import image_keys
from dan_dist.model.classes import join_names
from shards.files import write_atomically
from shards.format import Split
from shards.releases.source import safe_key

GROUPS = "groups.csv"
MOST = 40  # groups of a column: a column of more, as of exact ages, names no groups
NOT_LISTED = "(not listed)"

log = logging.getLogger(__name__)


class Groups(NamedTuple):
    """The groups of a split's images."""

    columns: dict[str, list[str]]  # column → the group of each image
    facts: dict[str, Any]  # about the file, plain values for the JSON file


def read_groups(path: Path, split: Split) -> Groups:
    """Matches the lines of a CSV file with a split's images by `key`, or by `path`.

    Every line is matched or counted: files often list other splits too. Images without a line are a
    group of their own. A line twice, no match at all, or too many groups are a ValueError.
    """
    header, rows = _read(path)
    places, taken = _places(image_keys(split)), dict[int, int]()
    columns = {name: [NOT_LISTED] * len(split) for name in header[1:]}
    unmatched: list[str] = []
    for number, row in enumerate(rows, start=2):
        if (k := _place(row[0], places)) is None:
            unmatched.append(row[0])
            continue
        if k in taken:
            raise ValueError(f"{path}, line {number}: {row[0]} is line {taken[k]}'s image already")
        taken[k] = number
        for name, value in zip(header[1:], row[1:], strict=True):
            columns[name][k] = value.strip() or "(empty)"
    if not taken:
        raise ValueError(
            f"{path}: none of its {len(rows)} lines is of an image of split '{split.name}' of "
            f"{split.root}; the first is {rows[0][0] if rows else 'not there'}"
        )
    for name, values in columns.items():
        if (count := len(set(values))) > MOST:
            raise ValueError(
                f"{path}: column '{name}' has {count} values, expected groups, at most {MOST}"
            )
    facts = {
        "file": path.name,
        "matched": len(taken),
        "images_not_listed": len(split) - len(taken),
        "lines_unmatched": len(unmatched),
    }
    log.info("groups: %d of %d images have a line in %s", len(taken), len(split), path)
    if unmatched:
        log.info("groups: %d lines match no image: %s", len(unmatched), join_names(unmatched, 3))
    return Groups(columns, facts)


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a file whose first column is made that of the images."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    header = [name.strip() for name in table[0]] if table else []
    named = [name for name in ("key", "path") if name in header]
    if not named or len(header) < 2 or len(set(header)) < len(header):
        raise ValueError(
            f"{path}: columns {', '.join(header) or 'none'}; expected 'path' or 'key', and others"
        )
    for number, row in enumerate(table, start=1):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} values, expected {len(header)}")
    at = header.index(named[0])
    turned = [[row[at], *row[:at], *row[at + 1 :]] for row in [header, *table[1:]]]
    return turned[0], turned[1:]


def _places(keys: Sequence[str]) -> dict[str, int | None]:
    """Each image by its key, and by what follows the class in it; None where that is not one."""
    found: dict[str, int | None] = {}
    for k, key in enumerate(keys):
        if "_" in key:
            rest = key.split("_", 1)[1]
            found[rest] = None if rest in found else k
    return found | dict(zip(keys, range(len(keys)), strict=True))


def _place(name: str, places: Mapping[str, int | None]) -> int | None:
    """The image of a key, or of a path as `shards.pack` makes keys of it."""
    path = Path(name.strip())
    tries = (name.strip(), safe_key(f"{path.parent.name}_{path.stem}"), safe_key(path.stem))
    return next((k for word in tries if (k := places.get(word)) is not None), None)


def judge_groups(rows: Rows, split: Split, groups: Groups) -> dict[str, Any]:
    """For each column its groups' figures with intervals, and its widest gap in accuracy."""
    labels, names = split.index["label"], split.class_names
    found: dict[str, Any] = {"source": groups.facts, "columns": {}}
    for column, values in groups.columns.items():
        groups_of = np.array(values)
        table = {
            group: _figures(confusion(rows[groups_of == group], labels[groups_of == group]), names)
            for group in sorted(set(values))
        }
        listed = {k: v["accuracy"] for k, v in table.items() if k != NOT_LISTED}
        low, high = min(listed, key=listed.__getitem__), max(listed, key=listed.__getitem__)
        gap = {"accuracy": listed[high] - listed[low], "from": low, "to": high}
        found["columns"][column] = {"groups": table, "widest_gap": gap}
    return found


def _figures(matrix: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, Any]:
    summary, found = summarise(matrix, names), intervals(matrix, names)
    return {
        "images": int(matrix.sum()),
        **{key: summary[key] for key in WHOLE},
        "intervals": {key: found[key] for key in WHOLE},
    }


def add_groups(details: Details, found: dict[str, Any], title: str) -> Details:
    """A report's details with those of its groups."""
    lines, metrics = [], dict(details.metrics)
    for column, own in found["columns"].items():
        for group, figures in own["groups"].items():
            low, high = figures["intervals"]["accuracy"]
            lines.append(
                f"{column} {group}: accuracy {100 * figures['accuracy']:.2f} % "
                f"({100 * low:.2f} to {100 * high:.2f}), mean recall "
                f"{100 * figures['mean_recall']:.2f} %, macro f1 "
                f"{100 * figures['macro_f1']:.2f} %, {figures['images']} images"
            )
        gap = own["widest_gap"]
        lines.append(f"{column}: widest gap {100 * gap['accuracy']:.2f} points, from {gap['from']} "
                     f"to {gap['to']}")  # fmt: skip
        metrics[f"gap/{column}"] = gap["accuracy"]
    figure = LazyFigure("groups.png", groups_figure, (found["columns"],), title)
    return Details(
        {**details.values, "groups": found}, metrics, (*details.figures, figure),
        [*lines, *details.lines],
    )  # fmt: skip


def write_groups(path: Path, found: dict[str, Any]) -> None:
    """The groups as a table: a line a group, intervals as two columns."""
    ends = [f"{key}_{end}" for key in WHOLE for end in ("low", "high")]
    lines = [["column", "group", "images", *WHOLE, *ends]]
    for column, own in found["columns"].items():
        for group, figures in own["groups"].items():
            values = [figures[key] for key in ("images", *WHOLE)]
            bounds = [end for key in WHOLE for end in figures["intervals"][key]]
            lines.append([column, group, *map(str, values), *map(str, bounds)])
    buffer = io.StringIO()
    csv.writer(buffer).writerows(lines)
    write_atomically(path, buffer.getvalue())
