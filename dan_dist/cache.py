"""Shards near the GPU: a node's own copy of a set that lies on slow or remote storage.

The copy's folder is named by the manifest's checksum, so that a set packed anew is copied anew and
jobs of several sets share one cache. Every file is verified by sha256 as it is copied; the manifest
comes last. What is already there is kept, whoever copied it and however that ended.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from tqdm import tqdm

from dan_dist.shardset import (
    INDEX_DTYPE,
    MANIFEST,
    ShardSet,
    parse_manifest,
    sha256_of,
    write_atomically,
)

# What fsspec may open. It knows others that chain protocols or reach other machines' shells.
PROTOCOLS = ("http", "https", "s3", "gs", "az", "abfs", "hf")
THREADS = 8  # files copied at once
ATTEMPTS = 3  # of each file
RETRY_S = 1.0

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """One file of a set."""

    name: str
    size_bytes: int | None  # None: the manifest does not say
    sha256: str


def is_remote(source: str) -> bool:
    """Whether `source` is a URL rather than a folder."""
    return ":" in source.split("/", 1)[0]


def localise(source: str, cache: str | None) -> str:
    """The folder to read the set `source` from: itself, or its copy in `cache`, made if need be.

    One process of a node copies, others that call this wait for it.

    Raises:
        ValueError: a URL of no known protocol or without a cache, or no manifest of shards.
        OSError: the source cannot be read, a file is not what its manifest says, the disk is full.
    """
    if cache is None:
        if is_remote(source):
            raise ValueError(f"data.shards {source} is remote: set data.cache to a local folder")
        return source
    fetch = _fetcher(source)
    home = Path(cache)
    home.mkdir(parents=True, exist_ok=True)
    # A name of its own for each process, as several may ask at once.
    draft = home / f"{MANIFEST}.{os.getpid()}"
    try:
        fetch(MANIFEST, draft)
        content = draft.read_bytes()
    finally:
        draft.unlink(missing_ok=True)
    folder = home / hashlib.sha256(content).hexdigest()[:16]
    shards = parse_manifest(folder, content)
    with _locked(folder.with_suffix(".lock"), folder):
        folder.mkdir(exist_ok=True)
        todo = [file for file in _files(shards) if not _is_there(folder / file.name, file)]
        if todo:
            _check_space(folder, todo)
            _copy(fetch, folder, todo, source)
        if not (folder / MANIFEST).exists():
            write_atomically(folder / MANIFEST, content)
    return str(folder)


def _fetcher(source: str) -> Callable[[str, Path], None]:
    """A function that copies a named file of `source` to a path; errors name the file."""
    protocol = source.split(":", 1)[0] if is_remote(source) else "file"
    if is_remote(source) and (protocol not in PROTOCOLS or "::" in source):
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ValueError(f"data.shards {source}: expected a folder, or a URL of {known}")
    try:
        files, root = fsspec.core.url_to_fs(source)
    except ImportError as error:
        raise OSError(f"{source}: {error}; pip install -e '.[remote]' brings most of them") from (
            error
        )

    def fetch(name: str, target: Path) -> None:
        try:
            files.get_file(f"{root.rstrip('/')}/{name}", str(target))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source}/{name} not found") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise OSError(f"{source}/{name}: {error}") from error
        except Exception as error:  # each protocol's library has errors of its own
            raise OSError(f"{source}/{name}: {type(error).__name__}: {error}") from error

    return fetch


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    """One process at a time fills a folder; the lock ends with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that fills %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files(shards: ShardSet) -> list[Wanted]:
    files = [
        Wanted(shards.index_names[split], None, shards.index_sha256[split])
        for split in shards.splits
    ]
    for own in shards.shards.values():
        files += [Wanted(shard.name, shard.size_bytes, shard.sha256) for shard in own]
    return files


def _is_there(path: Path, file: Wanted) -> bool:
    """Files are renamed into place when verified, so that their size tells; an index is small."""
    if not path.is_file():
        return False
    if file.size_bytes is None:
        return sha256_of(path) == file.sha256
    return path.stat().st_size == file.size_bytes


def _check_space(folder: Path, todo: list[Wanted]) -> None:
    needed = sum(file.size_bytes or 0 for file in todo)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"data.cache {folder.parent}: {needed / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free"
        )


def _copy(
    fetch: Callable[[str, Path], None], folder: Path, todo: list[Wanted], source: str
) -> None:
    total = sum(file.size_bytes or INDEX_DTYPE.itemsize for file in todo)
    log.info("copying %d files, %.1f MB, from %s to %s", len(todo), total / 1e6, source, folder)
    bar = tqdm(desc="copying shards", total=total, unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        copies = {pool.submit(_copy_one, fetch, folder, file): file for file in todo}
        try:
            for done in as_completed(copies):
                done.result()
                bar.update(copies[done].size_bytes or INDEX_DTYPE.itemsize)
        except OSError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(f"data.cache {folder.parent}: the disk is full; {total / 1e6:,.1f} MB "
                          f"were needed for {source}") from error  # fmt: skip


def _copy_one(fetch: Callable[[str, Path], None], folder: Path, file: Wanted) -> None:
    partial = folder / f"{file.name}.partial"
    fault: Any = None
    for attempt in range(ATTEMPTS):
        if fault:
            log.warning("%s; trying again", fault)
            time.sleep(RETRY_S * attempt)
        try:
            fetch(file.name, partial)
            if (found := sha256_of(partial)) == file.sha256:
                partial.replace(folder / file.name)
                return
            fault = OSError(f"{file.name}: its sha256 is {found}, the manifest says {file.sha256}")
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            fault = error
        finally:
            partial.unlink(missing_ok=True)
    raise fault
