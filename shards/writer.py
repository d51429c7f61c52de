"""From a release (a list of images and a way to read them) to finished shards, in parallel.

Shard borders are cut from the list before anything is dropped, and every shard is written by
itself: the same source gives the same bytes with any number of workers, after any interruption.
While packing, `OUT/packing.json` says of what; each finished shard leaves a `.done` record. The
manifest comes last and the records go.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
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

SHARD_SIZE = 1000  # images: some 15 MB of 224 px faces
MAX_UNREADABLE = 0.01  # of the listed images; more stop the pack
NAMES_KEPT = 100  # dropped images named in the manifest
STATE, CONTACT_SHEET = "packing.json", "contact_sheet.png"

_OURS = re.compile(
    rf"({STATE}|{MANIFEST}|index-.+\.npy|.+-\d\d+-\d{{5}}\.(tar|idx|done))(\.partial)?"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One listed image of a release."""

    key: str  # unique within its split; shardset.check_key says what it may be
    label: int
    source: Any  # what the release's `read` needs; small and picklable
    meta: dict[str, Any] | None = None


@dataclass(frozen=True)
class Release:
    """A data set as downloaded: what it holds and how one image is read."""

    dataset: str
    release: str
    class_names: tuple[str, ...]  # in label order
    splits: dict[str, list[Item]]
    read: "Read"  # a module-level function; OSError, ValueError: dropped
    dropped: dict[str, int] = field(default_factory=dict)  # reason → images left out by rule


Read = Callable[[Item], bytes | Image.Image]


@dataclass(frozen=True)
class Job:
    """One shard to be written."""

    name: str
    split: str
    items: list[Item]


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
) -> Path:
    """Packs `release` into `out` at size×size pixels (None keeps sizes); returns the manifest.

    workers: processes, 0 for one a core. An unfinished pack of the same release and options is
    continued; any other non-empty folder needs `overwrite`, which removes shards and nothing else.

    Raises:
        ValueError: an empty class or split, a key twice, more than 1 % unreadable images, or a
            folder that holds something else.
        OSError: `out` cannot be written, or a worker process died.
    """
    if min(shard_size, 1 if size is None else size) < 1:
        raise ValueError(f"size and shard_size must be at least 1, got {size} and {shard_size}")
    _check(release)
    out = Path(out)
    jobs = _cut(release, shard_size)
    _claim(out, _describe(release, size, shard_size), overwrite)
    listed = sum(len(job.items) for job in jobs)
    todo, drops = _remaining(jobs, out, int(MAX_UNREADABLE * listed))
    bar = tqdm(desc=f"packing {release.dataset}", total=listed, unit="img",
               initial=listed - sum(len(job.items) for job in todo),
               disable=None if progress else True)  # fmt: skip
    with bar, _run(todo, release.read, out, size, workers) as finished:
        for job, job_drops in finished:
            bar.update(len(job.items))
            for name in job_drops:
                log.warning("left out %s", name)
            drops += len(job_drops)
            if drops > MAX_UNREADABLE * listed:
                raise ValueError(
                    f"{drops} of {listed} images are unreadable (the last: {job_drops[-1]}); "
                    f"at most {MAX_UNREADABLE:.0%} are tolerated, check the source"
                )
    return _finish(release, jobs, out, size)


def _remaining(jobs: list[Job], out: Path, limit: int) -> tuple[list[Job], int]:
    """The jobs without a record, and how many images the recorded ones left out.

    Where those are more than `limit`, an earlier run stopped for it: their shards are tried again,
    as the source may have been mended since.
    """
    done = {job.name for job in jobs if (out / f"{job.name}.done").exists()}
    dropped = {job.name: len(_record(out, job).drops) for job in jobs if job.name in done}
    if sum(dropped.values()) > limit:
        done = {name for name in done if not dropped[name]}
    return [job for job in jobs if job.name not in done], sum(dropped[name] for name in done)


def _check(release: Release) -> None:
    for split, items in release.splits.items():
        if not items:
            raise ValueError(f"{release.dataset}: split '{split}' holds no images")
        key, count = Counter(item.key for item in items).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{release.dataset}: key '{key}' stands {count} times in '{split}'")
        for item in items:
            check_key(item.key)
            if not 0 <= item.label < len(release.class_names):
                raise ValueError(f"'{item.key}' has label {item.label}, outside class_names")
    present = {item.label for item in release.splits.get("train", [])}
    for label, name in enumerate(release.class_names):
        if "train" in release.splits and label not in present:
            raise ValueError(f"{release.dataset}: class '{name}' has no training images")


def _cut(release: Release, shard_size: int) -> list[Job]:
    jobs = []
    for split, items in release.splits.items():
        classes: defaultdict[int, list[Item]] = defaultdict(list)
        for item in items:
            classes[item.label].append(item)
        for label, own in sorted(classes.items()):
            for k, start in enumerate(range(0, len(own), shard_size)):
                name = f"{split}-{label:02d}-{k:05d}"
                jobs.append(Job(name, split, own[start : start + shard_size]))
    return jobs


def _describe(release: Release, size: int | None, shard_size: int) -> str:
    """What identifies a pack: continuing one of another source or other options would mix them."""
    digest = hashlib.sha256()
    for split, items in release.splits.items():
        for item in items:
            digest.update(f"{split} {item.key} {item.label} {item.source} {item.meta}\n".encode())
    described = {
        "dataset": release.dataset,
        "release": release.release,
        "class_names": release.class_names,
        "size": size,
        "shard_size": shard_size,
        "list_sha256": digest.hexdigest(),
    }
    return json.dumps(described, indent=1)


def _claim(out: Path, description: str, overwrite: bool) -> None:
    """Makes `out` ours: new, continued, or emptied of what an earlier pack wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    state = out / STATE
    content = sorted(p for p in out.iterdir() if p.name != CONTACT_SHEET)
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


@contextmanager
def _run(
    jobs: list[Job], read: Read, out: Path, size: int | None, workers: int
) -> Iterator[Iterator[tuple[Job, list[str]]]]:
    """Writes the jobs' shards in worker processes; yields each as it is done."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        yield ((job, write_job(job, read, out, size)) for job in jobs)
        return
    # Not fork: the caller may hold torch's threads. The fork server starts from a clean process.
    context = multiprocessing.get_context("forkserver")
    with _without_main(), ProcessPoolExecutor(workers, context, _start_worker) as pool:
        futures = {pool.submit(write_job, job, read, out, size): job for job in jobs}
        try:
            yield ((futures[done], done.result()) for done in as_completed(futures))
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a packing process died (out of memory?); the same command continues where it was"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; when the parent is killed, its workers end with it.

    Left alone, they would go on writing while the next run writes the same shards.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _without_main() -> Iterator[None]:
    """Worker processes import `__main__` again, which may be a training script: hide its path."""
    main = sys.modules["__main__"]
    names = vars(main)
    hidden: dict[str, Any] = {n: names.pop(n) for n in ("__file__", "__spec__") if n in names}
    try:
        main.__spec__ = None
        yield
    finally:
        names.update(hidden)


def write_job(job: Job, read: Read, out: Path, size: int | None) -> list[str]:
    """Writes one shard and its record; returns the names and reasons of the images left out."""
    drops: list[str] = []
    kept = 0

    def samples() -> Iterator[Sample]:
        nonlocal kept
        for item in job.items:
            try:
                jpeg, verbatim = to_jpeg(read(item), size)
            except (OSError, ValueError) as error:
                drops.append(f"{job.split}/{item.key} ({item.source}): {error}")
                continue
            kept += verbatim
            yield Sample(item.key, jpeg, item.label, item.meta)

    shard, rows = write_shard(out / f"{job.name}.tar", samples())
    record = {"shard": asdict(shard), "rows": rows.tolist(), "drops": drops, "verbatim": kept}
    write_atomically(out / f"{job.name}.done", json.dumps(record))
    return drops


def _record(out: Path, job: Job) -> Record:
    record = json.loads((out / f"{job.name}.done").read_text(encoding="utf-8"))
    # An array at once: as Python numbers, the rows of ten million samples fill gigabytes.
    rows = np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE)
    return Record(Shard(**record["shard"]), rows, record["drops"], record["verbatim"])


def _finish(release: Release, jobs: list[Job], out: Path, size: int | None) -> Path:
    """Joins the shards' records into indexes and manifest, then removes them."""
    records = {job.name: _record(out, job) for job in jobs}
    splits: dict[str, tuple[list[Shard], Any]] = {}
    for split in release.splits:
        own = [records[job.name] for job in jobs if job.split == split]
        own = [record for record in own if record.shard.samples]
        if not own:
            raise ValueError(f"{release.dataset}: no image of split '{split}' is readable")
        for number, record in enumerate(own):
            record.rows["shard"] = number
        splits[split] = [r.shard for r in own], np.concatenate([r.rows for r in own])
    drops = [name for record in records.values() for name in record.drops]
    verbatim = sum(record.verbatim for record in records.values())
    total = sum(len(index) for _, index in splits.values())
    pixels = f"{size}×{size}" if size else "their own size"
    manifest = write_manifest(
        out,
        dataset=release.dataset,
        release=release.release,
        class_names=release.class_names,
        image_size=size,
        image_policy=f"{verbatim} of {total} images are the original bytes; the others: bilinear "
        f"to {pixels}, JPEG quality {JPEG_QUALITY}, 4:4:4",
        splits=splits,
        dropped={**release.dropped, **({"unreadable": len(drops)} if drops else {})},
        dropped_names=drops[:NAMES_KEPT],
    )
    for job in jobs:
        if not records[job.name].shard.samples:  # all its images were unreadable
            (out / f"{job.name}.tar").unlink()
            (out / f"{job.name}.idx").unlink()
        (out / f"{job.name}.done").unlink()
    (out / STATE).unlink()
    return manifest
