"""From a release (a list of images and a way to read them) to finished shards, in parallel.

Shard borders are cut from the list before anything is dropped, and every shard is written by
itself: the same source gives the same bytes with any number of workers, in one part or several,
after any interruption. While packing, `OUT/packing.json` says of what; each finished shard leaves a
`.done` record. The manifest comes last and the records go.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dan_dist.shardset import (
    INDEX_DTYPE,
    MANIFEST,
    Sample,
    Shard,
    check_key,
    write_atomically,
    write_manifest,
    write_shard,
)
from shards.images import JPEG_QUALITY, to_jpeg
from shards.pool import in_processes
from shards.release import NAMES_KEPT, Item, Read, Release

SHARD_SIZE = 1000  # images: some 15 MB of 224 px faces
MAX_UNREADABLE = 0.01  # of the listed images; more stop the pack
MIXING_SEED = 0
STATE, CONTACT_SHEET = "packing.json", "contact_sheet.png"

_OURS = re.compile(
    rf"({STATE}|{MANIFEST}|packing[-\w]*\.lock|index-.+\.npy"
    r"|.+-\d{5}\.(tar|idx|done))(\.partial)?"
)

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
    continued; any other non-empty folder needs `overwrite`, which removes shards and nothing else.
    Of several `parts` (1 … parts), which may run at once on several machines into one folder, each
    writes its share of the shards and returns None; `merge` ends the pack.

    Raises:
        ValueError: an empty class or split, a key twice, more than 1 % unreadable images, or a
            folder that holds something else.
        OSError: `out` cannot be written, is being packed already, or a worker process died.
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
    with _locked(out, part, parts):
        _claim(out, description, overwrite)
        workers = workers or len(os.sched_getaffinity(0))
        _write(release, jobs[part - 1 :: parts], out, size, workers, progress)
        return merge(out, locked=True) if parts == 1 else None


def merge(out: str | Path, *, locked: bool = False) -> Path:
    """Ends a pack whose shards are all written: joins their records to indexes and a manifest.

    Raises:
        FileNotFoundError: nothing is being packed into `out`.
        ValueError: shards are missing, which names them, or more than 1 % of all is unreadable.
        OSError: a part is still running.
    """
    out = Path(out)
    if not (out / STATE).is_file():
        raise FileNotFoundError(f"{out / STATE} not found: no parts were packed into {out}")
    with ExitStack() as stack:
        if not locked:
            stack.enter_context(_locked(out, 1, 1))
        return _finish(out, json.loads((out / STATE).read_text(encoding="utf-8")))


def _plan(release: Release, size: int | None, shard_size: int) -> tuple[list[Job], str]:
    """The shards to write, and what identifies the pack: continuing another would mix the two.

    Raises:
        ValueError: an empty split or class, a key twice or impossible, a label out of range.
    """
    digest, jobs = hashlib.sha256(), []
    for split, items in release.splits.items():
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
        if split == "train" and not present.all():
            name = release.class_names[int(np.argmin(present))]
            raise ValueError(f"{release.dataset}: class '{name}' has no training images")
        jobs += _cut(split, labels, shard_size, mixed=release.mixed)
    names = {split: [j.name for j in jobs if j.split == split] for split in release.splits}
    description = {
        "dataset": release.dataset,
        "release": release.release,
        "class_names": release.class_names,
        "size": size,
        "listed": {split: len(items) for split, items in release.splits.items()},
        "list_sha256": digest.hexdigest(),
        "left_out": dict(release.left_out.counts),
        "left_out_names": release.left_out.names,
        "shards": names,
    }
    return jobs, json.dumps(description, indent=1)


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


@contextmanager
def _locked(out: Path, part: int, parts: int) -> Iterator[None]:
    """Keeps a second pack out of the folder; the parts of one pack let each other in.

    The locks end with the process, however it ends. A file system without locks goes without.
    """
    whole = fcntl.LOCK_SH if parts > 1 else fcntl.LOCK_EX
    locks = {"packing.lock": whole, f"packing-{part}-of-{parts}.lock": fcntl.LOCK_EX}
    with ExitStack() as stack:
        for name, kind in locks.items():
            file = stack.enter_context((out / name).open("w"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(f"--out {out}: another process is packing into it") from error
            except OSError:
                log.warning("%s: this file system has no locks; start one pack at a time", out)
        try:
            yield
        finally:
            for name, kind in locks.items():
                if kind == fcntl.LOCK_EX:  # the other parts still hold the shared one
                    (out / name).unlink(missing_ok=True)


def _claim(out: Path, description: str, overwrite: bool) -> None:
    """Makes `out` ours: new, continued, or emptied of what an earlier pack wrote."""
    state = out / STATE
    content = sorted(p for p in out.iterdir() if p.name != CONTACT_SHEET and p.suffix != ".lock")
    if state.is_file() and state.read_text(encoding="utf-8") == description:
        return
    if content and not overwrite:
        kind = "an unfinished pack of another source or other options" if state.exists() else (
            "finished shards" if (out / MANIFEST).exists() else "other files"
        )  # fmt: skip
        raise ValueError(f"--out {out} holds {kind}; choose another folder or give --overwrite")
    foreign = [p.name for p in content if not _is_ours(p)]
    if foreign:
        raise ValueError(
            f"--out {out} holds {foreign[0]}, which no pack wrote; nothing was removed"
        )
    for path in sorted(content, key=lambda p: p.name != MANIFEST):  # first what makes it look whole
        path.unlink()
    write_atomically(state, description)


def _is_ours(path: Path) -> bool:
    return path.is_file() and _OURS.fullmatch(path.name) is not None


def _write(
    release: Release, jobs: list[Job], out: Path, size: int | None, workers: int, progress: bool
) -> None:
    """Writes the shards that are not there yet, as long as few enough images are unreadable."""
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
            if drops > MAX_UNREADABLE * listed:
                raise ValueError(_too_many(drops, listed, job_drops[-1]))


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
    done = {job.name for job in jobs if (out / f"{job.name}.done").exists()}
    dropped = {job.name: len(_record(out, job.name).drops) for job in jobs if job.name in done}
    if sum(dropped.values()) > limit:
        done = {name for name in done if not dropped[name]}
    return [job for job in jobs if job.name not in done], sum(dropped[name] for name in done)


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
            except (OSError, ValueError) as error:
                file = item.source if isinstance(item.source, str) else item.source[0]
                drops.append(f"{split}/{item.key} ({file}): {error}")
                continue
            kept += verbatim
            yield Sample(item.key, jpeg, item.label, meta)

    path = out / f"{name}.tar"
    try:
        shard, rows = write_shard(path, samples())
        record = {"shard": asdict(shard), "rows": rows.tolist(), "drops": drops, "verbatim": kept}
        write_atomically(path.with_suffix(".done"), json.dumps(record))
    except OSError as error:  # a full disk, say: of what file, Python does not say
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return drops


def _record(out: Path, name: str) -> Record:
    record = json.loads((out / f"{name}.done").read_text(encoding="utf-8"))
    # An array at once: as Python numbers, the rows of ten million samples fill gigabytes.
    rows = np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE)
    return Record(Shard(**record["shard"]), rows, record["drops"], record["verbatim"])


def _finish(out: Path, plan: dict[str, Any]) -> Path:
    """Joins the shards' records into indexes and manifest, then removes them."""
    names = [name for own in plan["shards"].values() for name in own]
    missing = [name for name in names if not (out / f"{name}.done").is_file()]
    if missing:
        raise ValueError(
            f"{out}: {len(missing)} of {len(names)} shards are not packed yet ({missing[0]} is the "
            "first); run the parts that did not finish"
        )
    records = {name: _record(out, name) for name in names}
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
    manifest = write_manifest(
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
    )
    for name in names:
        if not records[name].shard.samples:  # all its images were unreadable
            (out / f"{name}.tar").unlink()
            (out / f"{name}.idx").unlink()
        (out / f"{name}.done").unlink()
    for stale in [*out.glob("*.partial"), *out.glob("packing-*.lock")]:  # of killed runs
        stale.unlink()
    (out / STATE).unlink()
    return manifest
