"""Shards near the GPU: a node's own copy of a set that lies on slow or remote storage.

The copy's folder is named by the manifest's checksum, so that a set packed anew is copied anew and
jobs of several sets share one cache. Every file that training reads is verified by sha256 as it is
copied; the manifest comes last. What is already there is kept, whoever copied it and however that
ended.
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import fsspec
from tqdm import tqdm

from dan_dist.redaction import redact
from shards.files import locked, sha256_of, write_atomically
from shards.format import MANIFEST, ShardSet, copy_name, parse_manifest
from shards.index import INDEX_DTYPE

# What fsspec may open. It knows others that chain protocols or reach other machines' shells.
PROTOCOLS = ("http", "https", "s3", "gs", "az", "abfs", "hf")
THREADS = 8  # files copied at once
ATTEMPTS = 3  # of each file
RETRY_S = 1.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class FileEntry(NamedTuple):
    """One file of a set."""

    name: str
    size_bytes: int  # of an index without its header
    sha256: str


class Source(NamedTuple):
    """Where a set is copied from; errors name the file."""

    read: Callable[[str], bytes]  # a file's name → its bytes
    fetch: Callable[[str, Path], None]  # a file's name, where to copy it


def is_remote(source: str) -> bool:
    """Whether `source` is a URL rather than a folder."""
    return ":" in source.split("/", 1)[0]


def localise(source: str, cache: str | None) -> str:
    """The folder to read the set `source` from: itself, or its copy in `cache`, made if need be.

    One process of a node copies, others that call this wait for it.

    Raises:
        ValueError: a URL of no known protocol or without a cache, or no manifest of shards.
        OSError: the source cannot be read, a file is not what its manifest lists, the disk is full.
    """
    if cache is None:
        if is_remote(source):
            shown = redact(source)
            raise ValueError(f"data.shards {shown} is remote: set data.cache to a local folder")
        return source
    origin, home = _origin(source), Path(cache)
    content = origin.read(MANIFEST)  # into memory: the error of a full disk needs it
    folder = home / copy_name(content)
    files = _files(parse_manifest(folder, content))
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock, taken = folder.with_suffix(".lock"), f"another process fills {folder}"
        with locked(lock, taken, wait=True):
            folder.mkdir(exist_ok=True)
            if todo := _missing(folder, files):
                _check_space(folder, todo)
                _copy(origin.fetch, folder, todo, redact(source))
            if not (folder / MANIFEST).exists():
                write_atomically(folder / MANIFEST, content)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(f"data.cache {cache}: the disk is full; {_megabytes(files)} are needed for "
                      f"{redact(source)}") from error  # fmt: skip
    return str(folder)


def read_manifest(source: str) -> bytes:
    """The manifest of the set in a folder or at a URL.

    Raises:
        ValueError: a URL of no known protocol. OSError: it cannot be read.
    """
    return _origin(source).read(MANIFEST)


def _origin(source: str) -> Source:
    """How the files of a folder or URL are read; errors do not give away what signs a URL."""
    shown = redact(source)
    protocol = source.split(":", 1)[0] if is_remote(source) else "file"
    if is_remote(source) and (protocol not in PROTOCOLS or "::" in source):
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ValueError(f"data.shards {shown}: expected a folder, or a URL of {known}")
    is_web = protocol in ("http", "https")
    is_signed = is_web and bool(urlsplit(source).query)
    try:
        # What is signed is quoted already, and holds for these very characters.
        files, root = fsspec.core.url_to_fs(source, **({"encoded": True} if is_signed else {}))
    except ImportError as error:
        raise OSError(f"{shown}: {error}; pip install -e '.[remote]' brings most of them") from (
            error
        )

    def read(name: str) -> bytes:
        with _naming(redact(file_address(source, name, is_web=is_web))):
            content: bytes = files.cat_file(file_address(root, name, is_web=is_web))
            return content

    def fetch(name: str, target: Path) -> None:
        with _naming(redact(file_address(source, name, is_web=is_web))):
            files.get_file(file_address(root, name, is_web=is_web), str(target))

    return Source(read, fetch)


def file_address(root: str, name: str, *, is_web: bool) -> str:
    """The address of a file of the set at `root`: its name goes before a query, which signs it."""
    if not is_web:
        return f"{root.rstrip('/')}/{name}"
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}", fragment=""))


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors name the file; each protocol's library has errors of its own."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} not found") from error
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise OSError(f"{file}: {redact(str(error))}") from error
    except Exception as error:
        raise OSError(f"{file}: {type(error).__name__}: {redact(str(error))}") from error


def _files(shards: ShardSet) -> list[FileEntry]:
    files = []
    for split, own in shards.shards.items():
        samples = sum(shard.samples for shard in own)
        name, sha256 = shards.index_names[split], shards.index_sha256[split]
        files.append(FileEntry(name, samples * INDEX_DTYPE.itemsize, sha256))
        files += [FileEntry(shard.name, shard.size_bytes, shard.sha256) for shard in own]
    return files


def _missing(folder: Path, files: list[FileEntry]) -> list[FileEntry]:
    """What is still to be copied.

    Once there is a manifest, a tar of the right size counts as whole. Before, the machine may have
    failed meanwhile, and a file of the right size need not hold what was written: it is read again.
    """
    is_whole = (folder / MANIFEST).exists()

    def is_there(file: FileEntry) -> bool:
        path = folder / file.name
        if not path.is_file():
            return False
        if is_whole and path.suffix == ".tar":
            return path.stat().st_size == file.size_bytes
        return sha256_of(path) == file.sha256

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(is_there, files))
    return [file for file, is_found in zip(files, found, strict=True) if not is_found]


def _check_space(folder: Path, todo: list[FileEntry]) -> None:
    free = shutil.disk_usage(folder).free
    if sum(file.size_bytes for file in todo) > free:
        raise OSError(
            f"data.cache {folder.parent}: {_megabytes(todo)} are needed, {free / 1e6:,.1f} MB are "
            "free"
        )


def _megabytes(files: list[FileEntry]) -> str:
    return f"{sum(file.size_bytes for file in files) / 1e6:,.1f} MB"


def _copy(
    fetch: Callable[[str, Path], None], folder: Path, todo: list[FileEntry], source: str
) -> None:
    total = sum(file.size_bytes for file in todo)
    log.info("copying %d files, %s, from %s to %s", len(todo), _megabytes(todo), source, folder)
    bar = tqdm(desc="copying shards", total=total, unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        copies = {pool.submit(_copy_one, fetch, folder, file): file for file in todo}
        try:
            for done in as_completed(copies):
                done.result()
                bar.update(copies[done].size_bytes)
        except OSError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy_one(fetch: Callable[[str, Path], None], folder: Path, file: FileEntry) -> None:
    partial = folder / f"{file.name}.partial"
    fault: Any = None
    for attempt in range(ATTEMPTS):
        if fault:
            log.warning("%s; trying again", fault)
            time.sleep(RETRY_S * attempt)
        try:
            fetch(file.name, partial)
            if (found := sha256_of(partial)) == file.sha256:
                with partial.open("rb+") as written:
                    os.fsync(written.fileno())
                partial.replace(folder / file.name)
                return
            fault = OSError(f"{file.name}: its sha256 is {found}, the manifest has {file.sha256}")
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            fault = error
        finally:
            partial.unlink(missing_ok=True)
    raise fault
