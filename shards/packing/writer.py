"""From a release (a list of images and a way to read them) to finished shards, in parallel.

Shard borders are cut from the list before anything is dropped, and every shard is written by
itself: the same source gives the same bytes with any number of workers, in one part or several,
after any interruption. While packing, `OUT/packing.json` says of what; each finished shard leaves a
`.done` record. The manifest comes last and the records go. An image that cannot be decoded is left
out; one that cannot be read stops the pack, as another time it may be.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.files import write_atomically
from shards.format import (
    INDEX_DTYPE,
    MANIFEST,
    Sample,
    Shard,
    check_key,
    open_shardset,
    write_manifest,
    write_shard,
)
from shards.images import JPEG_QUALITY, to_jpeg
from shards.packing.claim import (
    STATE,
    claim,
    is_finished,
    locked_for_packing,
    remove_partials,
    sha256_of_pack,
)
from shards.packing.pool import in_processes
from shards.release import NAMES_KEPT, Item, Read, Release

SHARD_SIZE = 1000  # images: some 15 MB of 224 px faces
MAX_UNREADABLE = 0.01  # of the listed images; more stop the pack
MIXING_SEED = 0
SUFFIXES = (".tar", ".idx")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One shard to be written: the images of `split` at these positions of its list."""

    name: str
    split: str
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard before the manifest is written."""

    shard: Shard
    rows: NDArray[Any]  # (samples,) INDEX_DTYPE, shard number 0
    drops: list[str]  # names and reasons of the images left out
    verbatim: int  # images whose bytes are the original ones


def pack(
    release: Release,
    out: str | Path,
    *,
    size: int | None,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
    part: int = 1,
    parts: int = 1,
) -> Path | None:
    """Packs `release` into `out` at size×size pixels (None keeps sizes); returns the manifest.

    workers: processes, 0 for one a core. An unfinished pack of the same release and options is
    continued, a finished one left as it is; any other non-empty folder needs `overwrite`, which
    removes shards and nothing else. Of several `parts` (1 … parts), which may run at once on
    several machines into one folder, each writes its share of the shards and returns None; `merge`
    ends the pack.

    Raises:
        ValueError: an empty class or split, a key twice, more than 1 % unreadable images, or a
            folder that holds something else.
        OSError: the source cannot be read or `out` not be written, it is being packed already, or a
            worker process died.
    """
    if min(shard_size, 1 if size is None else size) < 1:
        raise ValueError(f"size and shard_size must be at least 1, got {size} and {shard_size}")
    if not 1 <= part <= parts:
        raise ValueError(f"part {part} of {parts}: expected 1 to {parts}")
    if overwrite and parts > 1:
        raise ValueError("--overwrite and --part: one part would remove what the others wrote")
    jobs, description = _plan(release, size, shard_size)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked_for_packing(out, part, parts):
        if overwrite or not is_finished(out, description):
            claim(out, description, parts, overwrite=overwrite)
            if parts == 1:
                remove_partials(out)
            _write(release, jobs, out, size, workers or len(os.sched_getaffinity(0)), progress,
                   slice(part - 1, None, parts))  # fmt: skip
        return _finish(out, description) if parts == 1 else None


def merge(out: str | Path) -> Path:
    """Ends a pack whose shards are all written: joins their records to indexes and a manifest.

    Raises:
        FileNotFoundError: nothing is being packed into `out`.
        ValueError: shards are missing, which names them, or more than 1 % of all is unreadable.
        OSError: a part is still running.
    """
    out = Path(out)
    if not (out / STATE).is_file() and not (out / MANIFEST).is_file():
        raise FileNotFoundError(f"{out / STATE} not found: no parts were packed into {out}")
    with locked_for_packing(out):
        if not (out / STATE).is_file():
            return out / MANIFEST
        return _finish(out, json.loads((out / STATE).read_text(encoding="utf-8")))


def _plan(release: Release, size: int | None, shard_size: int) -> tuple[list[Job], dict[str, Any]]:
    """The shards to write, and what identifies the pack: continuing another would mix the two.

    Raises:
        ValueError: an empty split or class, a key twice or impossible, a label out of range, or a
            split whose name is no text.
    """
    digest, jobs = hashlib.sha256(), []
    for split, items in release.splits.items():
        if not split.isprintable():
            raise ValueError(f"{release.dataset}: split {split!r} has no printable name, rename it")
        if not len(items):
            raise ValueError(f"{release.dataset}: split '{split}' holds no images")
        labels = np.empty(len(items), np.int32)
        hashes = np.empty(len(items), np.int64)  # 8 bytes an image, where a set of keys takes 100
        for k, item in enumerate(items):
            check_key(item.key)
            if not 0 <= item.label < len(release.class_names):
                raise ValueError(f"'{item.key}' has label {item.label}, outside class_names")
            labels[k], hashes[k] = item.label, hash(item.key)
            line = f"{split} {item.key} {item.label} {item.source}\n"
            digest.update(line.encode(errors="surrogateescape"))
        _check_unique(release, split, hashes)
        present = np.bincount(labels, minlength=len(release.class_names)) > 0
        if split == "train" and not present.all() and not release.mixed:  # there, some are held out
            name = release.class_names[int(np.argmin(present))]
            raise ValueError(f"{release.dataset}: class '{name}' has no training images")
        jobs += _cut(split, labels, shard_size, mixed=release.mixed)
    names = {split: [j.name for j in jobs if j.split == split] for split in release.splits}
    description = {
        "dataset": release.dataset,
        "release": release.release,
        "class_names": list(release.class_names),
        "size": size,
        "listed": {split: len(items) for split, items in release.splits.items()},
        "list_sha256": digest.hexdigest(),
        "left_out": dict(release.left_out.counts),
        "left_out_names": list(release.left_out.names),
        "shards": names,
    }
    return jobs, description


def _check_unique(release: Release, split: str, hashes: NDArray[np.int64]) -> None:
    values, counts = np.unique(hashes, return_counts=True)
    suspects = np.isin(hashes, values[counts > 1])
    items = release.splits[split]
    keys = Counter(items[int(k)].key for k in np.flatnonzero(suspects))
    for key, count in keys.most_common(1):
        if count > 1:
            raise ValueError(f"{release.dataset}: key '{key}' stands {count} times in '{split}'")


def _cut(split: str, labels: NDArray[np.int32], shard_size: int, *, mixed: bool) -> list[Job]:
    """Shards of one class each, or of samples drawn from all of them."""
    if mixed:
        order = np.random.Generator(np.random.Philox(MIXING_SEED)).permutation(len(labels))
        groups = {f"{split}": order}
    else:
        order, classes = np.argsort(labels, kind="stable"), np.unique(labels)
        own = np.split(order, np.searchsorted(labels[order], classes[1:]))
        groups = {f"{split}-{c:02d}": ids for c, ids in zip(classes.tolist(), own, strict=True)}
    return [
        Job(f"{name}-{k:05d}", split, positions[start : start + shard_size])
        for name, positions in groups.items()
        for k, start in enumerate(range(0, len(positions), shard_size))
    ]


def _write(
    release: Release, jobs: list[Job], out: Path, size: int | None, workers: int, progress: bool,
    own: slice,
) -> None:  # fmt: skip
    """Writes our shards that are not there yet, as long as few enough of all images are unreadable.

    One part of several may have more than its share of them: that is for `merge` to judge.
    """
    total, jobs = sum(len(job.positions) for job in jobs), jobs[own]
    listed = sum(len(job.positions) for job in jobs)
    todo, drops = _remaining(jobs, out, int(MAX_UNREADABLE * listed))
    bar = tqdm(desc=f"packing {release.dataset}", total=listed, unit="img",
               initial=listed - sum(len(job.positions) for job in todo),
               disable=None if progress else True)  # fmt: skip

    def arguments(job: Job) -> tuple[Any, ...]:
        items = release.splits[job.split]
        return job.name, job.split, [items[int(k)] for k in job.positions], release.read, out, size

    with bar, in_processes(write_job, map(arguments, todo), min(len(todo), workers)) as finished:
        for number, job_drops in finished:
            bar.update(len(todo[number].positions))
            for name in job_drops:
                log.warning("left out %s", name)
            drops += len(job_drops)
            if drops > MAX_UNREADABLE * total:
                raise ValueError(_too_many(drops, total, job_drops[-1]))
    if drops > MAX_UNREADABLE * listed:
        log.warning("WARNING: %d of this part's %d images are unreadable; merge refuses more than "
                    "%.0f%% of all", drops, listed, 100 * MAX_UNREADABLE)  # fmt: skip


def _too_many(drops: int, listed: int, last: str) -> str:
    return (
        f"{drops} of {listed} images are unreadable (the last: {last}); "
        f"at most {MAX_UNREADABLE:.0%} are tolerated, check the source"
    )


def _remaining(jobs: list[Job], out: Path, limit: int) -> tuple[list[Job], int]:
    """The jobs without a record, and how many images the recorded ones left out.

    Where those are more than `limit`, an earlier run stopped for it: their shards are tried again,
    as the source may have been mended since.
    """
    records = {job.name: _record(out, job.name) for job in jobs}
    dropped = {name: len(record.drops) for name, record in records.items() if record}
    if sum(dropped.values()) > limit:
        dropped = {name: 0 for name, drops in dropped.items() if not drops}
    return [job for job in jobs if job.name not in dropped], sum(dropped.values())


def write_job(
    name: str, split: str, items: list[Item], read: Read, out: Path, size: int | None
) -> list[str]:
    """Writes one shard and its record; returns the names and reasons of the images left out."""
    drops: list[str] = []
    kept = 0

    def samples() -> Iterator[Sample]:
        nonlocal kept
        for item in items:
            try:
                image, meta = read(item)
                jpeg, verbatim = to_jpeg(image, size)
            except ValueError as error:
                file = item.source if isinstance(item.source, str) else item.source[0]
                drops.append(f"{split}/{item.key} ({file}): {error}")
                continue
            kept += verbatim
            yield Sample(item.key, jpeg, item.label, meta)

    path = out / f"{name}.tar"
    try:
        shard, rows = write_shard(path, samples())
        sizes = {suffix: path.with_suffix(suffix).stat().st_size for suffix in SUFFIXES}
        record = {"shard": asdict(shard), "rows": rows.tolist(), "drops": drops, "verbatim": kept,
                  "size_bytes": sizes}  # fmt: skip
        write_atomically(path.with_suffix(".done"), json.dumps(record))
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A full disk, say: of what file, Python does not say.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return drops


def _record(out: Path, name: str) -> Record | None:
    """What is known of a finished shard; None: there is none, or its files are not what it says."""
    try:
        record = json.loads((out / f"{name}.done").read_text(encoding="utf-8"))
        sizes = {suffix: (out / f"{name}{suffix}").stat().st_size for suffix in SUFFIXES}
        # An array at once: as Python numbers, the rows of ten million samples fill gigabytes.
        rows = np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE)
        found = Record(Shard(**record["shard"]), rows, record["drops"], record["verbatim"])
        return found if sizes == record["size_bytes"] else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _finish(out: Path, plan: dict[str, Any]) -> Path:
    """Joins the shards' records into indexes and manifest, then removes them."""
    names = [name for own in plan["shards"].values() for name in own]
    if not is_finished(out, plan):
        _join(out, plan, names)
    found = open_shardset(out)
    shipped = {shard.name for split in found.splits for shard in found.split(split).shards}
    for name in names:
        if f"{name}.tar" not in shipped:  # all its images were unreadable
            (out / f"{name}.tar").unlink(missing_ok=True)
            (out / f"{name}.idx").unlink(missing_ok=True)
        (out / f"{name}.done").unlink(missing_ok=True)
    remove_partials(out)
    (out / STATE).unlink(missing_ok=True)
    return out / MANIFEST


def _join(out: Path, plan: dict[str, Any], names: list[str]) -> None:
    found = {name: _record(out, name) for name in names}
    records = {name: record for name, record in found.items() if record}
    if missing := [name for name in names if name not in records]:
        raise ValueError(
            f"{out}: {len(missing)} of {len(names)} shards are not packed yet ({missing[0]} is the "
            "first); run the parts that did not finish"
        )
    drops = [name for record in records.values() for name in record.drops]
    listed = sum(plan["listed"].values())
    if len(drops) > MAX_UNREADABLE * listed:
        raise ValueError(_too_many(len(drops), listed, drops[-1]))
    splits: dict[str, tuple[list[Shard], Any]] = {}
    for split, own_names in plan["shards"].items():
        own = [records[name] for name in own_names if records[name].shard.samples]
        if not own:
            raise ValueError(f"{plan['dataset']}: no image of split '{split}' is readable")
        for number, record in enumerate(own):
            record.rows["shard"] = number
        splits[split] = [r.shard for r in own], np.concatenate([r.rows for r in own])
    verbatim = sum(record.verbatim for record in records.values())
    total = sum(len(index) for _, index in splits.values())
    size = plan["size"]
    write_manifest(
        out,
        dataset=plan["dataset"],
        release=plan["release"],
        class_names=tuple(plan["class_names"]),
        image_size=size,
        image_policy=f"{verbatim} of {total} images are the original bytes; the others: bilinear "
        f"to {f'{size}×{size}' if size else 'their own size'}, JPEG quality {JPEG_QUALITY}, 4:4:4",
        splits=splits,
        dropped={**plan["left_out"], **({"unreadable": len(drops)} if drops else {})},
        dropped_names=(plan["left_out_names"] + drops)[:NAMES_KEPT],
        pack_sha256=sha256_of_pack(plan),
    )
