"""One shard of a pack: its images read, made fit and written, with a record of it beside it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.files import write_atomically
from shards.format import INDEX_DTYPE, Sample, Shard, write_shard
from shards.images import to_jpeg
from shards.release import Item, Read

SUFFIXES = (".tar", ".idx")


@dataclass(frozen=True)
class Record:
    """A finished shard that no manifest lists yet."""

    shard: Shard
    rows: NDArray[Any]  # (samples,) INDEX_DTYPE, shard number 0
    drops: list[str]  # names and reasons of the images left out
    verbatim: int  # images whose bytes are the original ones


def write_job(
    name: str, split: str, items: list[Item], read: Read, out: Path, size: int | None
) -> list[str]:
    """Writes one shard and its record; returns the names and reasons of the images left out."""
    drops: list[str] = []
    verbatim = 0

    def samples() -> Iterator[Sample]:
        nonlocal verbatim
        for item in items:
            try:
                image, meta = read(item)
                jpeg, is_original = to_jpeg(image, size)
            except ValueError as error:
                file = item.source if isinstance(item.source, str) else item.source[0]
                drops.append(f"{split}/{item.key} ({file}): {error}")
                continue
            verbatim += is_original
            yield Sample(item.key, jpeg, item.label, meta)

    path = out / f"{name}.tar"
    shard, rows = write_shard(path, samples())
    sizes = {suffix: path.with_suffix(suffix).stat().st_size for suffix in SUFFIXES}
    record = {"shard": asdict(shard), "rows": rows.tolist(), "drops": drops,
              "verbatim": verbatim, "size_bytes": sizes}  # fmt: skip
    write_atomically(path.with_suffix(".done"), json.dumps(record))
    return drops


def read_record(out: Path, name: str) -> Record | None:
    """The record of a finished shard; None: there is none, or it is not of the files there."""
    try:
        record = json.loads((out / f"{name}.done").read_text(encoding="utf-8"))
        sizes = {suffix: (out / f"{name}{suffix}").stat().st_size for suffix in SUFFIXES}
        # An array at once: as Python numbers, the rows of ten million samples fill gigabytes.
        rows = np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE)
        found = Record(Shard(**record["shard"]), rows, record["drops"], record["verbatim"])
        return found if sizes == record["size_bytes"] else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
