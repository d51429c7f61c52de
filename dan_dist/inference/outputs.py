"""The files that a prediction may write: CSV, Parquet, features, and pictures to look at.

Each is written as rows come, under another name, and appears when all rows are there.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.files import read_regular, replacing, write_atomically
from shards.images import MAX_BYTES, decode, encode
from shards.releases.source import plain_name, safe_key

FEATURES = 512
DRAWN_SIDES = 256, 1024  # pixels of a drawn picture's longer side, at least and at most


class Row(NamedTuple):
    """An image that was given, and what the network makes of it; or why it could not be read."""

    number: int  # from 1, in the order in which images are given
    path: Path
    fault: str  # "": it was read
    probabilities: NDArray[np.float32]  # (classes,); NaN where the image could not be read
    features: NDArray[np.float32]  # (512,), likewise


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
def writing(files: Files, class_names: Sequence[str], images: int) -> Iterator[Write]:
    """What takes all rows, in their order, and hands them to each file that is wanted."""
    names = [plain_name(name) for name in class_names]
    with ExitStack() as stack:
        writers: list[Write] = []
        if files.csv:
            writers.append(stack.enter_context(_csv(files.csv, names)))
        if files.parquet:
            writers.append(stack.enter_context(_parquet(files.parquet, names)))
        if files.features and files.features.suffix == ".npy":
            writers.append(stack.enter_context(_feature_array(files.features, images)))
        elif files.features:
            writers.append(stack.enter_context(_feature_table(files.features)))
        if files.draw:
            folder = files.draw
            writers.append(lambda rows: [_draw(row, names, folder) for row in rows])  # type: ignore

        def write(rows: Sequence[Row]) -> None:
            for writer in writers:
                writer(rows)

        yield write


@contextmanager
def _csv(path: Path, names: list[str]) -> Iterator[Write]:
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["path", "class", "error", *map(_column, names)])

        def write(rows: Sequence[Row]) -> None:
            for row in rows:
                values = [""] * len(names) if row.fault else row.probabilities.tolist()
                table.writerow([plain_name(str(row.path)), _class(row, names), row.fault, *values])

        yield write
        text.detach()  # flushed, and not closed with it


@contextmanager
def _parquet(path: Path, names: list[str]) -> Iterator[Write]:
    import pyarrow as pa

    columns = [("path", pa.string()), ("class", pa.string()), ("error", pa.string())]
    schema = pa.schema([*columns, *((_column(name), pa.float32()) for name in names)])

    def arrays(rows: Sequence[Row]) -> list[Any]:
        faulty = np.array([bool(row.fault) for row in rows])
        values = np.stack([row.probabilities for row in rows])
        return [
            [plain_name(str(row.path)) for row in rows],
            [_class(row, names) or None for row in rows],
            [row.fault or None for row in rows],
            *(pa.array(column, mask=faulty) for column in values.T),
        ]

    with _table(path, schema, arrays) as write:
        yield write


@contextmanager
def _feature_table(path: Path) -> Iterator[Write]:
    import pyarrow as pa

    # Not of a fixed size: Arrow does not read such lists back where one is null.
    features = pa.list_(pa.float32())
    schema = pa.schema([("path", pa.string()), ("error", pa.string()), ("l2_norm", pa.float32()),
                        ("features", features)])  # fmt: skip

    def arrays(rows: Sequence[Row]) -> list[Any]:
        unit, norms = normalised(rows)
        faulty = np.array([bool(row.fault) for row in rows])
        return [
            [plain_name(str(row.path)) for row in rows],
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
def _feature_array(path: Path, images: int) -> Iterator[Write]:
    with replacing(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (images, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda rows: _write_bytes(file, normalised(rows)[0].astype("<f4").tobytes())


def _write_bytes(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def normalised(rows: Sequence[Row]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(rows, 512) features of L2 norm 1, and the (rows,) norms that the network gave them."""
    features = np.stack([row.features for row in rows])
    norms: NDArray[np.float32] = np.linalg.norm(features, axis=1).astype(np.float32)
    divisors = np.where(norms > 0, norms, 1)[:, None]
    return (features / divisors).astype(np.float32), norms


def _class(row: Row, names: list[str]) -> str:
    return "" if row.fault else names[row.probabilities.argmax()]


def _column(name: str) -> str:
    return f"probability_{name}"


def _draw(row: Row, names: list[str], folder: Path) -> None:
    """The picture, upright, with class and probability beneath it."""
    if row.fault:
        return
    picture = decode(read_regular(row.path, MAX_BYTES))
    least, most = DRAWN_SIDES
    longer = max(picture.size)
    scale = min(max(longer, least), most) / longer
    width, height = (max(1, round(side * scale)) for side in picture.size)
    text = f"{_class(row, names)} {row.probabilities.max():.1%}"
    font = ImageFont.load_default(max(16, width // 20))
    band = round(1.6 * max(16, width // 20))
    sheet = Image.new("RGB", (max(width, round(font.getlength(text)) + 16), height + band), "white")
    sheet.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    ImageDraw.Draw(sheet).text((8, height + band // 8), text, fill="black", font=font)
    write_atomically(folder / f"{row.number:06d}-{safe_key(row.path.stem)}.jpg", encode(sheet))
