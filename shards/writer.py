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
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dan_dist.shardset import (
    INDEX_DTYPE,
    MANIFEST,
    Sample,
    Shard,
    write_atomically,
    write_manifest,
    write_shard,
)
from shards.images import JPEG_QUALITY, to_jpeg

SHARD_SIZE = 1000  # images: some 15 MB of 224 px faces
MAX_UNREADABLE = 0.01  # of the listed images; more stop the pack
NAMES_KEPT = 100  # dropped images named in the manifest
STATE, CONTACT_SHEET = "packing.json", "contact_sheet.png"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One listed image of a release."""

    key: str  # unique within its split; no dots, no slashes
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
    read: Callable[
        [Item], bytes | Image.Image
    ]  # a module-level function; OSError, ValueError: dropped
    dropped: dict[str, int] = field(default_factory=dict)  # reason → images left out by rule


@dataclass(frozen=True)
class Job:
    """One shard to be written."""

    name: str
    split: str
    items: list[Item]


def pack(
    release: Release,
    out: str | Path,
    *,
    size: int | None,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
) -> Path:
    """Packs `release` into `out` at size×size pixels (None keeps sizes); returns the manifest.

    workers: processes, 0 for one a core. An unfinished pack of the same release and options is
    continued; any other non-empty folder needs `overwrite`, which removes shards and nothing else.

    Raises:
        ValueError: an empty class or split, a key twice, more than 1 % unreadable images, or a
            folder that holds something else.
        OSError: `out` cannot be written.
    """
    _check(release)
    out = Path(out)
    jobs = _cut(release, shard_size)
    _claim(out, _describe(release, size, shard_size), overwrite)
    todo = [job for job in jobs if not (out / f"{job.name}.done").exists()]
    listed = sum(len(j.items) for j in jobs)
    done = listed - sum(len(j.items) for j in todo)
    drops = sum(len(_record(out, j)["drops"]) for j in jobs if j not in todo) if done else 0
    bar = tqdm(
        total=listed, initial=done, desc=f"packing {release.dataset}", unit="img", disable=None
    )
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


def _check(release: Release) -> None:
    for split, items in release.splits.items():
        if not items:
            raise ValueError(f"{release.dataset}: split '{split}' holds no images")
        key, count = Counter(item.key for item in items).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{release.dataset}: key '{key}' stands {count} times in '{split}'")
    present = {item.label for item in release.splits.get("train", [])}
    for label, name in enumerate(release.class_names):
        if "train" in release.splits and label not in present:
            raise ValueError(f"{release.dataset}: class '{name}' has no training images")


def _cut(release: Release, shard_size: int) -> list[Job]:
    jobs = []
    for split, items in release.splits.items():
        for label in range(len(release.class_names)):
            own = [item for item in items if item.label == label]
            for k, start in enumerate(range(0, len(own), shard_size)):
                name = f"{split}-{label:02d}-{k:05d}"
                jobs.append(Job(name, split, own[start : start + shard_size]))
    return jobs


def _describe(release: Release, size: int | None, shard_size: int) -> str:
    """What identifies a pack: continuing one of another source or other options would mix them."""
    digest = hashlib.sha256()
    for split, items in release.splits.items():
        for item in items:
            digest.update(f"{split} {item.key} {item.label} {item.source}\n".encode())
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
    name = path.name.removesuffix(".partial")
    if name in (STATE, MANIFEST) or (name.startswith("index-") and name.endswith(".npy")):
        return True
    parts = name.split(".")[0].rsplit("-", 2)
    endings = (".tar", ".idx", ".done")
    return name.endswith(endings) and len(parts) == 3 and (parts[1] + parts[2]).isdigit()


@contextmanager
def _run(
    jobs: list[Job], read: Callable[[Item], bytes | Image.Image], out: Path, size: int | None,
    workers: int,
) -> Iterator[Iterator[tuple[Job, list[str]]]]:  # fmt: skip
    """Writes the jobs' shards in worker processes; yields each as it is done."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        yield ((job, write_job(job, read, out, size)) for job in jobs)
        return
    # Not fork: the caller may hold torch's threads. The fork server starts from a clean process.
    context = multiprocessing.get_context("forkserver")
    with _without_main(), ProcessPoolExecutor(workers, context) as pool:
        futures = {pool.submit(write_job, job, read, out, size): job for job in jobs}
        try:
            yield ((futures[done], done.result()) for done in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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


def write_job(
    job: Job, read: Callable[[Item], bytes | Image.Image], out: Path, size: int | None
) -> list[str]:
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


def _record(out: Path, job: Job) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / f"{job.name}.done").read_text(encoding="utf-8"))
    return record


def _finish(release: Release, jobs: list[Job], out: Path, size: int | None) -> Path:
    """Joins the shards' records into indexes and manifest, then removes them."""
    records = {job.name: _record(out, job) for job in jobs}
    splits: dict[str, tuple[list[Shard], Any]] = {}
    for split in release.splits:
        own = [records[job.name] for job in jobs if job.split == split]
        rows = [np.array([tuple(r) for r in record["rows"]], INDEX_DTYPE) for record in own]
        for number, part in enumerate(rows):
            part["shard"] = number
        splits[split] = [Shard(**record["shard"]) for record in own], np.concatenate(rows)
    drops = [name for record in records.values() for name in record["drops"]]
    verbatim = sum(record["verbatim"] for record in records.values())
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
        (out / f"{job.name}.done").unlink()
    (out / STATE).unlink()
    return manifest
