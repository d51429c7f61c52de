"""One shard of a pack: its images read, made fit and written, with a record of it beside it."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.files import write_atomically
from shards.format import Sample, Shard, write_shard
from shards.images import holds_one_value, to_jpeg
from shards.index import INDEX_DTYPE, npy_bytes, with_soft
from shards.likeness import jpeg_picture_or_blank, likenesses
from shards.release import Item, Read

LIKENESSES = ".npy"
SUFFIXES = (".tar", ".idx", LIKENESSES)  # the last one goes when the set is finished


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
    write_atomically(path.with_suffix(LIKENESSES), npy_bytes(likenesses(pictures)))
    sizes = {suffix: path.with_suffix(suffix).stat().st_size for suffix in SUFFIXES}
    record = {"shard": asdict(shard), "rows": rows.tolist(), "soft": soft, "drops": drops,
              "verbatim": verbatim, "flat": flat, "whites": whites,
              "size_bytes": sizes}  # fmt: skip
    write_atomically(path.with_suffix(".done"), json.dumps(record))
    return drops


def read_record(out: Path, name: str) -> Record | None:
    """The record of a finished shard; None: there is none, or it is not of the files there."""
    try:
        record = json.loads((out / f"{name}.done").read_text(encoding="utf-8"))
        sizes = {suffix: (out / f"{name}{suffix}").stat().st_size for suffix in SUFFIXES}
        # An array at once: as Python numbers, the rows of ten million samples fill gigabytes.
        rows = np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE)
        if soft := record.get("soft"):
            rows = with_soft(rows, np.array(soft))
        flat = record.get("flat", [])
        whites = Counter({int(white): n for white, n in record.get("whites", {}).items()})
        shard, kept = Shard(**record["shard"]), out / f"{name}{LIKENESSES}"
        found = Record(shard, rows, record["drops"], record["verbatim"], flat, whites, kept)
        return found if sizes == record["size_bytes"] else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
