"""From a release (a list of images and a way to read them) to finished shards, in parallel.

Shard borders are cut from the list before anything is dropped, and every shard is written by
itself: the same source gives the same bytes with any number of workers, in one part or several,
after any interruption. While packing, `OUT/packing.json` holds the plan; each finished shard leaves
a `.done` record. The manifest comes last and the records go. An image that cannot be decoded is
left out; one that cannot be read stops the pack, as another time it may be.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.duplicates import duplicate_groups, join_groups
from shards.folders import describe
from shards.format import MANIFEST, Manifest, open_shardset, write_index, write_manifest
from shards.images import JPEG_QUALITY
from shards.index import plain_rows, with_groups
from shards.likeness import same_photographs
from shards.limits import core_count
from shards.packing.claim import STATE, claim, is_finished, locked_for_packing, remove_partials
from shards.packing.job import (
    LIKENESSES,
    SUFFIXES,
    Record,
    read_likenesses,
    read_record,
    write_job,
)
from shards.packing.plan import Job, Plan, plan_pack, read_plan
from shards.packing.pool import in_processes
from shards.release import NAMES_KEPT, Release

SHARD_SIZE = 1000  # images: some 15 MB of 224 px faces
MAX_UNREADABLE = 0.01  # of the listed images; more stop the pack

NAMES_SHOWN = 5  # of images of a single value

log = logging.getLogger(__name__)


def pack(
    release: Release,
    out: str | Path,
    *,
    size: int | None,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
    part: tuple[int, int] = (1, 1),
) -> Path | None:
    """Packs `release` into `out` at size×size pixels (None keeps sizes); returns the manifest.

    workers: processes, 0 for one a core. An unfinished pack of the same release and options is
    continued, a finished one left as it is; any other non-empty folder needs `overwrite`, which
    removes shards and nothing else. Part (i, n) of several, which may run at once on several
    machines into one folder, writes its share of the shards and returns None; `merge` ends the
    pack.

    Raises:
        ValueError: an empty class or split, a key twice, more than 1 % unreadable images, or a
            folder that holds something else.
        OSError: the source cannot be read or `out` not be written, it is being packed already, or a
            worker process died.
    """
    number, parts = part
    if min(shard_size, 1 if size is None else size) < 1:
        raise ValueError(f"size and shard_size must be at least 1, got {size} and {shard_size}")
    if not 1 <= number <= parts:
        raise ValueError(f"part {number} of {parts}: expected 1 to {parts}")
    if overwrite and parts > 1:
        raise ValueError("--overwrite and --part: one part would remove what the others wrote")
    if passed_over := release.left_out.passed_over:
        log.info("passed over: %s", describe(passed_over))
    plan, jobs = plan_pack(release, size, shard_size)
    out, workers = Path(out), workers or core_count()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    if not overwrite and is_finished(out, plan) and not (out / STATE).exists():
        whole = open_shardset(out)  # nothing is left to write, or to remove
        for split in whole.splits:
            whole.split(split)
        return out / MANIFEST if parts == 1 else None
    out.mkdir(parents=True, exist_ok=True)
    with locked_for_packing(out, part):
        if overwrite or not is_finished(out, plan):
            claim(out, plan, parts, shard_size, overwrite=overwrite)
            if parts == 1:
                remove_partials(out)
            _write_shards(release, plan, jobs[number - 1 :: parts], out, workers, progress)
        return _finish(out, plan, workers) if parts == 1 else None


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
        return _finish(out, read_plan(out / STATE), core_count())


def _write_shards(
    release: Release, plan: Plan, jobs: list[Job], out: Path, workers: int, progress: bool
) -> None:
    """Writes those of a part's shards that are not there yet.

    Stops where too many of all the plan's images are unreadable. One part of several may have more
    than its share of them: that is for `merge` to judge.
    """
    listed = sum(len(job.positions) for job in jobs)
    todo, drops = _remaining(jobs, out, int(MAX_UNREADABLE * listed))
    bar = tqdm(desc=f"packing {release.dataset}", total=listed, unit="img",
               initial=listed - sum(len(job.positions) for job in todo),
               disable=None if progress else True)  # fmt: skip

    def arguments(job: Job) -> tuple[Any, ...]:
        items = release.splits[job.split]
        own = [items[int(k)] for k in job.positions]
        return job.name, job.split, own, release.read, out, plan.size, plan.is_compared

    with bar, in_processes(write_job, map(arguments, todo), min(len(todo), workers)) as finished:
        for number, job_drops in finished:
            bar.update(len(todo[number].positions))
            for name in job_drops:
                log.warning("left out %s", name)
            drops += len(job_drops)
            if job_drops:
                _check_readable(drops, plan.images, job_drops[-1])
    if drops > MAX_UNREADABLE * listed:
        log.warning("WARNING: %d of this part's %d images are unreadable; merge refuses more than "
                    "%.0f%% of all", drops, listed, 100 * MAX_UNREADABLE)  # fmt: skip


def _check_readable(drops: int, images: int, last: str) -> None:
    if drops > MAX_UNREADABLE * images:
        raise ValueError(
            f"{drops} of {images} images are unreadable (the last: {last}); "
            f"at most {MAX_UNREADABLE:.0%} are tolerated, check the source"
        )


def _remaining(jobs: list[Job], out: Path, limit: int) -> tuple[list[Job], int]:
    """The jobs without a record, and how many images the recorded ones left out.

    Where those are more than `limit`, an earlier run stopped for it: their shards are tried again,
    as the source may have been mended since. So are shards of which no image was readable.
    """
    records = {job.name: read_record(out, job.name) for job in jobs}
    dropped = {name: len(record.drops) for name, record in records.items()
               if record and record.shard.samples}  # fmt: skip
    if sum(dropped.values()) > limit:
        dropped = {name: 0 for name, drops in dropped.items() if not drops}
    return [job for job in jobs if job.name not in dropped], sum(dropped.values())


def _finish(out: Path, plan: Plan, workers: int) -> Path:
    """Joins the shards' records into indexes and manifest, then removes them."""
    names = [name for own in plan.shards.values() for name in own]
    if not is_finished(out, plan):
        _join(out, plan, names, workers)
    found = open_shardset(out)
    shipped = {shard.name for split in found.splits for shard in found.split(split).shards}
    for name in names:
        if f"{name}.tar" not in shipped:  # all its images were unreadable
            for suffix in SUFFIXES:
                (out / f"{name}{suffix}").unlink(missing_ok=True)
        for suffix in (".done", LIKENESSES):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
    remove_partials(out)
    (out / STATE).unlink(missing_ok=True)
    return out / MANIFEST


def _warn_of_flat(plan: Plan, split: str, records: list[Record]) -> None:
    """Names images of a single value, and classes without others: what was spoilt looks so."""
    flat = [key for record in records for key in record.flat]
    if not flat:
        return
    images = sum(record.shard.samples for record in records)
    more = ["…"] if len(flat) > NAMES_SHOWN else []
    log.warning("WARNING: in %d of %d images of split '%s' all pixels have one value: %s",
                len(flat), images, split, ", ".join(flat[:NAMES_SHOWN] + more))  # fmt: skip
    for label, name in enumerate(plan.class_names):
        own = [record for record in records if record.shard.label == label]
        if own and all(len(record.flat) == record.shard.samples for record in own):
            log.warning("WARNING: so have all images of class '%s'", name)


def _warn_of_whites(split: str, records: list[Record]) -> None:
    """Tells where images of one split were read as of several depths, each by its largest value."""
    whites: Counter[int] = Counter()
    for record in records:
        whites.update(record.whites)
    if len(whites) > 1:
        counts = ", ".join(f"{n} with {white} as white" for white, n in sorted(whites.items()))
        log.warning("WARNING: images of split '%s' have more than 8 bits and do not tell how many, "
                    "which was guessed by the largest value of each: %s; a dark one may have "
                    "become lighter: save them with 8 bits", split, counts)  # fmt: skip


def _check_classes(plan: Plan, split: str, shipped: set[str]) -> None:
    """Refuses a class without training images, all of whose are unreadable; warns in other splits.

    A class's shards are named after it; those of mixed labels are named after the split alone.
    """
    names = plan.shards[split]
    kept = {name.rpartition("-")[0] for name in names if f"{name}.tar" in shipped}
    for emptied in dict.fromkeys(name.rpartition("-")[0] for name in names):
        if emptied in kept:
            continue
        lost = plan.class_names[int(emptied.rpartition("-")[2])]
        if split == "train":
            raise ValueError(
                f"{plan.dataset}: class '{lost}' has no training images left: none that is listed "
                "is readable; mend one, or leave the class out"
            )
        log.warning("WARNING: class '%s' has no image left in split '%s'", lost, split)


def _join(out: Path, plan: Plan, names: list[str], workers: int) -> None:
    found = {name: read_record(out, name) for name in names}
    records = {name: record for name, record in found.items() if record}
    if missing := [name for name in names if name not in records]:
        raise ValueError(
            f"{out}: {len(missing)} of {len(names)} shards are not packed yet ({missing[0]} is the "
            "first); run the parts that did not finish"
        )
    drops = [name for record in records.values() for name in record.drops]
    if drops:
        _check_readable(len(drops), plan.images, drops[-1])
    shipped: dict[str, list[Record]] = {}
    indexes: dict[str, NDArray[Any]] = {}
    for split, own_names in plan.shards.items():
        _check_whole(out, plan, split, [records[name] for name in own_names])
        own = [records[name] for name in own_names if records[name].shard.samples]
        if not own:
            raise ValueError(f"{plan.dataset}: no image of split '{split}' is readable")
        _check_classes(plan, split, {record.shard.name for record in own})
        for number, record in enumerate(own):
            record.rows["shard"] = number
        _warn_of_flat(plan, split, own)
        _warn_of_whites(split, own)
        shipped[split], indexes[split] = own, np.concatenate([record.rows for record in own])
    if plan.is_compared:
        indexes = _grouped(shipped, indexes, workers)
    splits = {
        split: write_index(
            out, split, [record.shard for record in own], indexes[split], len(plan.class_names)
        )
        for split, own in shipped.items()
    }
    verbatim = sum(record.verbatim for record in records.values())
    total = sum(split["samples"] for split in splits.values())
    size = f"{plan.size}×{plan.size}" if plan.size else "their own size"
    manifest = Manifest(
        dataset=plan.dataset,
        release=plan.release,
        class_names=tuple(plan.class_names),
        image_size=plan.size,
        face_cut=plan.face_cut,
        image_policy=f"{verbatim} of {total} images are the original bytes; the others: bilinear "
        f"to {size}, JPEG quality {JPEG_QUALITY}, 4:4:4",
        splits=splits,
        dropped={**plan.left_out, **({"unreadable": len(drops)} if drops else {})},
        dropped_names=(plan.left_out_names + drops)[:NAMES_KEPT],
        pack_sha256=plan.sha256,
    )
    write_manifest(out, manifest)


def _check_whole(out: Path, plan: Plan, split: str, records: list[Record]) -> None:
    """Each image of the list is in one shard, or was left out, as shards of one size have them."""
    found = sum(record.shard.samples + len(record.drops) for record in records)
    if found != plan.listed[split]:
        raise ValueError(
            f"{out}: the shards of '{split}' hold {found} images of {plan.listed[split]}: not all "
            "were packed with the same --shard-size; pack again with --overwrite"
        )


def _grouped(
    records: Mapping[str, list[Record]], indexes: Mapping[str, NDArray[Any]], workers: int
) -> dict[str, NDArray[Any]]:
    """Each split's index, with a number for the images, of all splits, of one photograph."""
    kept = np.concatenate([read_likenesses(record) for own in records.values() for record in own])
    marks = duplicate_groups(np.concatenate([plain_rows(rows) for rows in indexes.values()]))
    pairs = same_photographs(kept, workers=workers)
    groups = join_groups([marks], (pairs.a, pairs.b))
    ends = np.cumsum([len(rows) for rows in indexes.values()])
    own = np.split(groups, ends[:-1])
    return {
        split: with_groups(rows, number)
        for (split, rows), number in zip(indexes.items(), own, strict=True)
    }
