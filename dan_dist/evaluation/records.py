"""A network's prediction for every image of a split, as a file that other programs read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.mixture import JoinedSplit, bounds_of
from shards.files import read_bounded, replacing
from shards.format import Split

PREDICTIONS = "predictions.parquet"
COLUMNS = ("key", "label", "predicted", "probabilities")
MOST_BYTES = 2**31
FACTS = b"dan_dist"  # of the file's metadata


class Predictions(NamedTuple):
    """What a file of predictions holds, in the order of the split's index."""

    path: Path
    keys: NDArray[np.str_]
    labels: NDArray[np.str_]  # names of classes
    predicted: NDArray[np.str_]
    probabilities: NDArray[np.float32]  # (images, classes)
    facts: dict[str, Any]  # split, step, class_names and fingerprint, among others

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.equal(self.labels, self.predicted)


def image_keys(split: Split) -> list[str]:
    """The key of each image; of several sets, after the set's name."""
    keys = [*split.keys()]
    if isinstance(split, JoinedSplit):
        own = zip(split.sets, bounds_of(split), strict=True)
        return [f"{name}/{key}" for name, part in own for key in keys[part]]
    return keys


def write_predictions(
    path: Path, split: Split, probabilities: NDArray[np.float32], facts: Mapping[str, Any]
) -> None:
    """Writes a line an image: key, label, predicted class, probabilities in label order.

    Raises:
        OSError: it cannot be written, or a key cannot be read.
    """
    import pyarrow as pa  # takes a while to import
    import pyarrow.parquet as pq

    names = np.array(split.class_names)
    found = {"class_names": list(split.class_names), "split": split.name, **facts}
    columns = [
        pa.array(image_keys(split)),
        pa.array(names[split.index["label"]]),
        pa.array(names[probabilities.argmax(axis=1)]),
        pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), len(names)),
    ]
    table = pa.table(columns, names=COLUMNS).replace_schema_metadata({FACTS: json.dumps(found)})
    with replacing(path) as file:
        pq.write_table(table, file)


def read_predictions(path: Path) -> Predictions:
    """A file that `write_predictions` wrote.

    Raises:
        ValueError: it is none. OSError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_bounded(path, MOST_BYTES)
    try:
        table = pq.read_table(pa.BufferReader(content))
        facts = json.loads((table.schema.metadata or {})[FACTS])
        columns = [table.column(name).combine_chunks() for name in COLUMNS]
        shape = (len(table), len(facts["class_names"]))
        probabilities = np.asarray(columns[3].flatten(), np.float32).reshape(shape)
    except Exception as error:  # Arrow's are of many kinds, some with several lines
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a file of predictions ({reason})") from error
    keys, labels, predicted = (np.array(own.to_pylist(), str) for own in columns[:3])
    return Predictions(path, keys, labels, predicted, probabilities, facts)


def check_comparable(one: Predictions, other: Predictions) -> None:
    """Refuses predictions of other images, or of images under other labels.

    Raises:
        ValueError: names both files and the first difference.
    """
    where = f"{one.path} and {other.path}"
    splits = [f"{p.facts['split']} of {len(p.keys)} images" for p in (one, other)]
    if len(one.keys) != len(other.keys) or one.facts["split"] != other.facts["split"]:
        raise ValueError(f"{where} are of different splits: {splits[0]} and {splits[1]}")
    differs = (one.keys != other.keys) | (one.labels != other.labels)
    if differs.any():
        k = int(differs.argmax())
        lines = [f"{p.keys[k]} ({p.labels[k]})" for p in (one, other)]
        raise ValueError(f"{where} differ in line {k + 1}: {lines[0]} and {lines[1]}")
