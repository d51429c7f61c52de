"""Shards near the GPU: a node's own copy of a set that lies on slow or remote storage.

The copy's folder is named by the manifest's checksum, so that a set packed anew is copied anew and
jobs of several sets share one cache. Every file that training reads is verified by sha256 as it is
copied; the manifest comes last. What is already there is kept, whoever copied it and however that
ended.
"""

import errno
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from tqdm import tqdm

from dan_dist.redaction import redact
from shards.files import locked, read_bounded, sha256_of, write_atomically
from shards.format import MANIFEST, MANIFEST_BYTES, ShardSet, copy_name, parse_manifest
from shards.index import most_bytes

T = TypeVar("T")

# What fsspec may open. It knows others that chain protocols or reach other machines' shells.
PROTOCOLS = ("http", "https", "s3", "gs", "az", "abfs", "hf")
THREADS = 8  # files copied at once
ATTEMPTS = 3  # of each file
RETRY_S = 1.0
CONNECT_S, READ_S = 30.0, 60.0  # that a web server may take to be there, and to send a few bytes
CHUNK_BYTES = 4 * 2**20  # of a file in a bucket, by one request
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class FileEntry(NamedTuple):
    """One file of a set."""

    name: str
    size_bytes: int  # of an index, the most
    sha256: str

    @property
    def tar_bytes(self) -> int:
        """What counts in the room for a copy: an index is small beside what it may be at most."""
        return self.size_bytes if self.name.endswith(".tar") else 0


class Source(NamedTuple):
    """Where a set is copied from; errors name the file."""

    read: Callable[[str], bytes]  # the manifest's name → its bytes
    fetch: Callable[[str, Path, int], None]  # a file's name, where to copy it, its bytes at most


class TooLongError(OSError):
    """A file has more bytes than it may have: it is another one, or has no end."""


class LocalError(OSError):
    """An error of the cache's own disk, whatever the source is."""


class _Bounded(io.RawIOBase):
    """Hands on what is written, up to so many bytes, to an open file."""

    def __init__(self, out: BinaryIO, path: Path, limit_bytes: int) -> None:
        self._out, self._path = out, path
        self._limit, self._left = limit_bytes, limit_bytes

    def write(self, data: Any, /) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise TooLongError(f"it goes on after {self._limit:,} bytes, the most that it may have")
        with _on_disk(self._path):
            return self._out.write(data)


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
    if (found := find_copy(cache, content)) is not None:
        return str(found)
    folder = home / copy_name(content)
    files = _files(parse_manifest(folder, content))
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock, taken = folder.with_suffix(".lock"), f"another process fills {folder}"
        with locked(lock, taken, wait=True):
            folder.mkdir(exist_ok=True)
            for left in folder.glob("*.partial"):  # by killed processes
                left.unlink(missing_ok=True)
            if todo := _missing(folder, files):
                _check_space(folder, todo)
                _copy(origin.fetch, folder, todo, redact(source))
            if find_copy(cache, content) is None:
                write_atomically(folder / MANIFEST, content)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(f"data.cache {cache}: the disk is full; {_megabytes(files)} are needed for "
                      f"{redact(source)}") from error  # fmt: skip
    return str(folder)


def find_copy(cache: str, manifest: bytes) -> Path | None:
    """The whole copy of a set in a cache, if there is one. Takes no lock: it may be read-only.

    Raises:
        ValueError: it is no manifest of shards.
    """
    folder = Path(cache) / copy_name(manifest)
    files = _files(parse_manifest(folder, manifest))
    if not (folder / MANIFEST).is_file():
        return None
    is_same = read_bounded(folder / MANIFEST, MANIFEST_BYTES) == manifest
    return folder if is_same and not _missing(folder, files) else None


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
    try:
        files, root = fsspec.core.url_to_fs(source, **(_web_options(source) if is_web else {}))
    except ImportError as error:
        raise OSError(f"{shown}: {error}; pip install -e '.[remote]' brings most of them") from (
            error
        )

    def transfer(name: str, out: _Bounded) -> None:
        address = file_address(root, name, is_web=is_web)
        with _naming(redact(file_address(source, name, is_web=is_web))):
            if is_web:
                files.get_file(address, out)
            elif protocol == "file" and not Path(address).is_file():
                raise FileNotFoundError  # a pipe, say, from which nothing may ever come
            else:
                with files.open(address, "rb", block_size=CHUNK_BYTES) as body:
                    shutil.copyfileobj(body, out, CHUNK_BYTES)

    def read(name: str) -> bytes:
        def attempt() -> bytes:
            content = io.BytesIO()
            transfer(name, _Bounded(content, Path(name), MANIFEST_BYTES))
            return content.getvalue()

        return _tried(attempt)

    def fetch(name: str, target: Path, limit_bytes: int) -> None:
        with _on_disk(target):
            file = target.open("wb")
        with file:
            transfer(name, _Bounded(file, target, limit_bytes))
            with _on_disk(target):
                file.flush()

    return Source(read, fetch)


def _web_options(source: str) -> dict[str, Any]:
    """fsspec's for a web address.

    aiohttp's own deadline, 300 s for a whole file, would refuse a large file on a slow line. What
    is signed is quoted already, and holds for these very characters.
    """
    import aiohttp  # as fsspec does, where the source is on the web

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
    return {"client_kwargs": {"timeout": timeout}, "encoded": bool(urlsplit(source).query)}


def _tried(task: Callable[[], T]) -> T:
    """What the task returns; it is tried again where another try may mend its error."""
    for attempt in range(1, ATTEMPTS):
        try:
            return task()
        except (FileNotFoundError, TooLongError, LocalError):
            raise
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            log.warning("%s; trying again", error)
        time.sleep(RETRY_S * attempt)
    return task()


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
    except TooLongError as error:
        raise TooLongError(f"{file}: {error}") from error
    except LocalError:
        raise
    except OSError as error:
        raise OSError(f"{file}: {_reason(error)}") from error
    except Exception as error:
        raise OSError(f"{file}: {type(error).__name__}: {_reason(error)}") from error


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Errors are of the file at `path`, in the cache, and of no source."""
    try:
        yield
    except OSError as error:
        raise LocalError(error.errno, error.strerror, str(path)) from error


def _reason(error: Exception) -> str:
    """An error's words; some have none."""
    nothing = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return redact(str(error)) or nothing


def _files(shards: ShardSet) -> list[FileEntry]:
    files = []
    for split, own in shards.shards.items():
        samples = sum(shard.samples for shard in own)
        name, sha256 = shards.index_names[split], shards.index_sha256[split]
        most = most_bytes(samples, len(shards.class_names))
        files.append(FileEntry(name, most, sha256))
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
    if sum(file.tar_bytes for file in todo) > free:
        raise OSError(
            f"data.cache {folder.parent}: {_megabytes(todo)} are needed, {free / 1e6:,.1f} MB are "
            "free"
        )


def _megabytes(files: list[FileEntry]) -> str:
    return f"{sum(file.tar_bytes for file in files) / 1e6:,.1f} MB"


def _copy(
    fetch: Callable[[str, Path, int], None], folder: Path, todo: list[FileEntry], source: str
) -> None:
    total = sum(file.tar_bytes for file in todo)
    log.info("copying %d files, %s, from %s to %s", len(todo), _megabytes(todo), source, folder)
    bar = tqdm(desc="copying shards", total=total, unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        copies = {
            pool.submit(_tried, partial(_copy_one, fetch, folder, file)): file for file in todo
        }
        try:
            for done in as_completed(copies):
                done.result()
                bar.update(copies[done].tar_bytes)
        except BaseException:  # Ctrl-C too: `with pool` would copy all that is left
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy_one(fetch: Callable[[str, Path, int], None], folder: Path, file: FileEntry) -> None:
    incomplete = folder / f"{file.name}.partial"
    try:
        fetch(file.name, incomplete, file.size_bytes)
        with _on_disk(incomplete):
            found = sha256_of(incomplete)
        if found != file.sha256:
            raise OSError(f"{file.name}: its sha256 is {found}, the manifest has {file.sha256}")
        with _on_disk(incomplete):
            with incomplete.open("rb+") as written:
                os.fsync(written.fileno())
            incomplete.replace(folder / file.name)
    finally:
        incomplete.unlink(missing_ok=True)
