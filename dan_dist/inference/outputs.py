"""The files that a prediction may write: CSV, Parquet, features; pictures: `drawing`.

Each is written as rows come, under another name, and appears when all rows are there.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.crops import NO_FACE
from dan_dist.inference.drawing import Label, draw
from shards.command import words
from shards.files import read_regular, replacing
from shards.images import MAX_BYTES, decode
from shards.releases.boxes import Box
from shards.releases.source import plain_name, safe_key

PLACE = ("face", "left", "top", "width", "height")  # columns of a photograph's face

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """An image that was given, or a face of it, and what the network makes of it; or a fault."""

    number: int  # of the image, from 1, in the order in which images are given
    path: Path
    face: int | None  # of a photograph, from 1; None: the image is a crop, or there is no face
    box: Box | None  # of that face
    fault: str  # why there is no prediction; "": there is one
    probabilities: NDArray[np.float32]  # (classes,); NaN where there is no prediction
    features: NDArray[np.float32]  # (C,), likewise
    changed: tuple[int, int] | None = None  # width and height of a crop that was made square

    @property
    def is_unread(self) -> bool:
        """Whether the image, or the face, could not be read."""
        return self.fault not in ("", NO_FACE)

    @property
    def place(self) -> tuple[int | None, ...]:
        """The values of PLACE."""
        return (self.face, *(self.box or (None,) * 4))


Write = Callable[[Sequence[Row]], None]


class Files(NamedTuple):
    """Where to write what; None: not wanted."""

    csv: Path | None
    parquet: Path | None
    features: Path | None
    draw: Path | None

    def check(self) -> None:
        """Makes the folders and refuses, in one line, what cannot be written.

        Raises:
            ValueError, OSError: a bad ending, two outputs in one file, or no access.
        """
        files = [path for path in (self.csv, self.parquet, self.features) if path is not None]
        if len({path.absolute() for path in files}) < len(files):
            raise ValueError(f"{files[0]}: two outputs in one file")
        if self.features and self.features.suffix not in (".npy", ".parquet"):
            raise ValueError(f"--features {self.features}: expected a file .npy or .parquet")
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"{path}: a folder, expected a file")
        if self.draw:
            self.draw.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(
    files: Files, class_names: Sequence[str], features: int, *, faces: bool
) -> Iterator[Write]:
    """What takes all rows, in their order, and hands them to each file that is wanted.

    Rows of an image come together. features: of a row. faces: of photographs, which have places.
    """
    names = [plain_name(name) for name in class_names]
    with ExitStack() as stack:
        writers: list[Write] = []
        if files.csv:
            writers.append(stack.enter_context(_csv(files.csv, names, faces)))
        if files.parquet:
            writers.append(stack.enter_context(_parquet(files.parquet, names, faces)))
        if files.features and files.features.suffix == ".npy":
            writers.append(stack.enter_context(_feature_array(files.features, features)))
        elif files.features:
            writers.append(stack.enter_context(_feature_table(files.features, faces)))
        if files.draw:
            writers.append(partial(_draw, names=names, folder=files.draw))

        def write(rows: Sequence[Row]) -> None:
            for writer in writers if rows else ():  # a rank may have had no image
                writer(rows)

        yield write


@contextmanager
def _csv(path: Path, names: list[str], faces: bool) -> Iterator[Write]:
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        place = PLACE if faces else ()
        table.writerow(["path", *place, "class", "error", *map(_column, names)])

        def write(rows: Sequence[Row]) -> None:
            for row in rows:
                values = [""] * len(names) if row.fault else row.probabilities.tolist()
                own = row.place if faces else ()
                told = (_class(row, names), row.fault, *values)
                table.writerow([plain_name(str(row.path)), *own, *told])

        yield write
        text.detach()  # flushed, and not closed with it


@contextmanager
def _parquet(path: Path, names: list[str], faces: bool) -> Iterator[Write]:
    import pyarrow as pa

    place = [(name, pa.int32()) for name in PLACE if faces]
    columns = [("path", pa.string()), *place, ("class", pa.string()), ("error", pa.string())]
    schema = pa.schema([*columns, *((_column(name), pa.float32()) for name in names)])

    def arrays(rows: Sequence[Row]) -> list[Any]:
        faulty = np.array([bool(row.fault) for row in rows])
        values = np.stack([row.probabilities for row in rows])
        return [
            [plain_name(str(row.path)) for row in rows],
            *(_places(rows) if faces else ()),
            [_class(row, names) or None for row in rows],
            [row.fault or None for row in rows],
            *(pa.array(column, mask=faulty) for column in values.T),
        ]

    with _table(path, schema, arrays) as write:
        yield write


@contextmanager
def _feature_table(path: Path, faces: bool) -> Iterator[Write]:
    import pyarrow as pa

    # Not of a fixed size: Arrow does not read such lists back where one is null.
    features = pa.list_(pa.float32())
    place = [(name, pa.int32()) for name in PLACE if faces]
    schema = pa.schema([("path", pa.string()), *place, ("error", pa.string()),
                        ("l2_norm", pa.float32()), ("features", features)])  # fmt: skip

    def arrays(rows: Sequence[Row]) -> list[Any]:
        unit, norms = normalised(rows)
        faulty = np.array([bool(row.fault) for row in rows])
        return [
            [plain_name(str(row.path)) for row in rows],
            *(_places(rows) if faces else ()),
            [row.fault or None for row in rows],
            pa.array(norms, mask=faulty),
            [None if row.fault else own for row, own in zip(rows, unit, strict=True)],
        ]

    with _table(path, schema, arrays) as write:
        yield write


@contextmanager
def _table(
    path: Path, schema: Any, arrays: Callable[[Sequence[Row]], list[Any]]
) -> Iterator[Write]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with replacing(path) as file, ParquetWriter(file, schema) as table:
        yield lambda rows: table.write_table(pa.Table.from_arrays(
            [pa.array(values, field.type) if isinstance(values, list) else values
             for values, field in zip(arrays(rows), schema, strict=True)], schema=schema
        ))  # fmt: skip


@contextmanager
def _feature_array(path: Path, features: int) -> Iterator[Write]:
    count = 0

    def write(rows: Sequence[Row]) -> None:
        nonlocal count
        count += len(rows)
        file.write(normalised(rows)[0].astype("<f4").tobytes())

    with replacing(path) as file:
        _write_header(file, 0, features)
        yield write
        file.seek(0)  # the header is as long as the first: NumPy leaves room for the number
        _write_header(file, count, features)


def _write_header(file: BinaryIO, rows: int, features: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, features)}
    np.lib.format.write_array_header_1_0(file, header)


def normalised(rows: Sequence[Row]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(rows, C) features of L2 norm 1, and the (rows,) norms that the network gave them."""
    features = np.stack([row.features for row in rows])
    norms: NDArray[np.float32] = np.linalg.norm(features, axis=1).astype(np.float32)
    divisors = np.where(norms > 0, norms, 1)[:, None]
    return (features / divisors).astype(np.float32), norms


def _class(row: Row, names: list[str]) -> str:
    return "" if row.fault else names[row.probabilities.argmax()]


def _column(name: str) -> str:
    return f"probability_{name}"


def _places(rows: Sequence[Row]) -> Iterator[list[int | None]]:
    return (list(column) for column in zip(*(row.place for row in rows), strict=True))


def _draw(rows: Sequence[Row], names: list[str], folder: Path) -> None:
    """A picture for each image that was read, under its number.

    One that has gone or changed since it was read has none; the log names it.
    """
    for number, own in groupby(rows, key=lambda row: row.number):
        found = list(own)
        labels = [
            Label(_text(row, names), row.box, row.face, int(row.probabilities.argmax()))
            for row in found
            if not row.is_unread
        ]
        if not labels:
            continue
        path = found[0].path
        try:
            picture = decode(read_regular(path, MAX_BYTES)).convert("RGB")
        except (OSError, ValueError) as error:
            log.warning("%s is not drawn, as it cannot be read again: %s", path, words(error))
            continue
        draw(picture, labels, folder / f"{number:06d}-{safe_key(path.stem)}.jpg")


def _text(row: Row, names: list[str]) -> str:
    return row.fault or f"{_class(row, names)} {row.probabilities.max():.1%}"
