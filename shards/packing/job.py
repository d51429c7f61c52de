"""One shard of a pack: its images read, made fit and written, with a record of it beside it."""

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.files import read_bounded, read_json, write_atomically
from shards.format import Sample, Shard, write_shard
from shards.images import holds_one_value, to_jpeg
from shards.index import INDEX_DTYPE, npy_bytes, with_soft
from shards.likeness import Likenesses, jpeg_picture_or_blank, likenesses
from shards.release import Item, Read

LIKENESSES = ".npy"
SUFFIXES = (".tar", ".idx", LIKENESSES)  # the last one goes when the set is finished
MOST_BYTES = 2**31  # of a record's file, and of what is kept of its images


@dataclass(frozen=True)
class Record:
    """A finished shard that no manifest lists yet."""

    shard: Shard
    rows: NDArray[Any]  # (samples,) INDEX_DTYPE or index_dtype, shard number 0
    drops: list[str]  # names and reasons of the images left out
    verbatim: int  # images whose bytes are the original ones
    flat: list[str]  # keys of images all of whose pixels have one value
    whites: Counter[int]  # images by the value that was taken for white, where that was a guess
    likenesses: Path  # what is kept of each image, LIKENESS; of none where none are compared


def write_job(
    name: str, split: str, items: list[Item], read: Read, out: Path, size: int | None,
    is_compared: bool,
) -> list[str]:  # fmt: skip
    """Writes one shard and its record; returns the names and reasons of the images left out."""
    drops: list[str] = []
    flat: list[str] = []
    soft: list[tuple[float, ...]] = []
    pictures: list[Image.Image] = []
    whites: Counter[int] = Counter()
    verbatim = 0

    def samples() -> Iterator[Sample]:
        nonlocal verbatim
        for item in items:
            try:
                content = read(item)
                jpeg, is_original = to_jpeg(content.image, size, whites)
            except ValueError as error:
                file = item.source if isinstance(item.source, str) else item.source[0]
                drops.append(f"{split}/{item.key} ({file}): {error}")
                continue
            verbatim += is_original
            if holds_one_value(jpeg):
                flat.append(f"{split}/{item.key}")
            if content.soft is not None:
                soft.append(content.soft)
            if is_compared:
                pictures.append(jpeg_picture_or_blank(jpeg))
            yield Sample(item.key, jpeg, item.label, content.meta)

    path = out / f"{name}.tar"
    shard, rows = write_shard(path, samples())
    assert len(soft) in (0, len(rows)), "a release has votes of all its images, or of none"
    write_atomically(path.with_suffix(LIKENESSES), kept := npy_bytes(likenesses(pictures)))
    sizes = {suffix: path.with_suffix(suffix).stat().st_size for suffix in SUFFIXES}
    record = {"shard": asdict(shard), "rows": rows.tolist(), "soft": soft, "drops": drops,
              "verbatim": verbatim, "flat": flat, "whites": whites, "size_bytes": sizes,
              "likenesses_crc32": zlib.crc32(kept)}  # fmt: skip
    content = json.dumps({**record, "crc32": _crc32(record)})
    write_atomically(path.with_suffix(".done"), content)
    return drops


def _crc32(record: Mapping[str, Any]) -> int:
    own = {key: value for key, value in record.items() if key != "crc32"}
    return zlib.crc32(json.dumps(own).encode())


def read_record(out: Path, name: str) -> Record | None:
    """The record of a finished shard; None: there is none, or it is not of the files there.

    One that is not as it was written, or of a former version, counts as none.
    """
    try:
        record = read_json(
            out / f"{name}.done", MOST_BYTES, {"crc32": int, "likenesses_crc32": int}
        )
        kept = out / f"{name}{LIKENESSES}"
        crc32s = _crc32(record), zlib.crc32(read_bounded(kept, MOST_BYTES))
        if crc32s != (record["crc32"], record["likenesses_crc32"]):
            return None
        sizes = {suffix: (out / f"{name}{suffix}").stat().st_size for suffix in SUFFIXES}
        # An array at once: as Python numbers, the rows of ten million samples fill gigabytes.
        rows = np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE)
        if soft := record["soft"]:
            rows = with_soft(rows, np.array(soft))
        whites = Counter({int(white): n for white, n in record["whites"].items()})
        found = Record(Shard(**record["shard"]), rows, record["drops"], record["verbatim"],
                       record["flat"], whites, kept)  # fmt: skip
        return found if sizes == record["size_bytes"] else None
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def read_likenesses(record: Record) -> Likenesses:
    """What is kept of a shard's images, (samples,) LIKENESS."""
    content = read_bounded(record.likenesses, MOST_BYTES)  # NumPy's own errors name no file
    found: Likenesses = np.load(BytesIO(content), allow_pickle=False)
    return found
