"""Atomic writes, checksums and locks, for every writer of a folder."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import reprlib
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

Check = Callable[[dict[str, Any]], None]
NO_FILE = "no regular file"  # a pipe, a socket, a device, a folder

log = logging.getLogger(__name__)

# What is wrong with a disk, not with what is written to it
BLOCK = 2**16  # bytes read at once of a file that tells no size
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/.*", re.IGNORECASE)  # pathlib keeps one slash of two


def is_address(path: Path) -> bool:
    """Whether a path is one of a server, where a file is expected."""
    return _ADDRESS.fullmatch(str(path)) is not None


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The content of a file that may come from elsewhere.

    Raises:
        ValueError: it is longer than that, or no regular file. OSError: it cannot be read.
    """
    try:
        content = read_regular(path, limit_bytes + 1, cut=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(content) > limit_bytes:
        raise ValueError(f"{path} has more than {limit_bytes:,} bytes, expected that many at most")
    return content


def read_json(
    path: Path, limit_bytes: int, form: Mapping[str, Any], check: Check | None = None
) -> dict[str, Any]:
    """The JSON object in a file that may be damaged, or come from elsewhere.

    form: keys that it must have, and the types of their values. check: looks further, and raises
    ValueError.

    Raises:
        ValueError: it is not such a file; names it. OSError: it cannot be read.
    """
    content = read_bounded(path, limit_bytes)
    try:
        found = parse_json(content, form)
        if check is not None:
            check(found)
    except ValueError as error:
        raise ValueError(f"{path} is not what was written: {error}") from error
    return found


def parse_json(content: bytes, form: Mapping[str, Any]) -> dict[str, Any]:
    """The object in a JSON text; see `read_json`.

    Raises:
        ValueError: it holds none of that form; does not name the file.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply, expected a JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds {reprlib.repr(found)}, expected a JSON object")
    check_form(found, form)
    return found


def check_form(found: Mapping[str, Any], form: Mapping[str, Any]) -> None:
    """Checks the types of some values of an object; whole numbers have 64 bits.

    Raises:
        ValueError: a value is of another type, or missing.
    """
    for key, kind in form.items():
        value = found.get(key)
        if not isinstance(value, kind) or (isinstance(value, int) and abs(value) >= 2**63):
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"{key!r} is {reprlib.repr(value)}, expected {expected}")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes `path` as `replacing` does: it is whole or absent."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_regular(path: str | Path, limit: int, *, follow: bool = True, cut: bool = False) -> bytes:
    """The bytes of a regular file, which are at most `limit`; never waits for a pipe's writer.

    follow: a link at the path's end. cut: of a larger file, its first bytes.

    Raises:
        ValueError: no regular file, or more bytes; does not name the file.
        OSError: it cannot be read; names the file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        file = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise ValueError(NO_FILE) from error
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(NO_FILE)
        parts, size = [], 0
        # A file object takes as long again. Files of /proc have a size of 0, others may grow; and
        # Python makes room at once for all that is asked for.
        wanted = min(limit, max(status.st_size, BLOCK)) if cut else min(status.st_size, limit) + 1
        while (not cut or size < limit) and (part := os.read(file, wanted)):
            size += len(part)
            if not cut and max(size, status.st_size) > limit:
                raise ValueError(f"{max(size, status.st_size)} bytes, at most {limit} are read")
            parts.append(part)
        return b"".join(parts)
    except OSError as error:  # Python's own names no file
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(file)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An open file that becomes `path` when the block ends; after an error it is removed.

    The file is flushed to the disk before it is renamed, and its folder after that, so that the new
    name survives a power cut too. A killed process leaves `<name>.<8 hex digits>.partial`.
    """
    # A name of its own, as another node may write the same file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):  # of a disk that has become read-only, for one
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_of(error, partial):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    with suppress(OSError):  # some network file systems refuse to flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partials(path: Path) -> None:
    """Removes what killed writers of `path` have left; its lock keeps others from writing now."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.????????.partial"):
        left.unlink(missing_ok=True)


def _is_of(error: OSError, partial: Path) -> bool:
    """Whether an error names a file that nobody knows, or, as that of a write does, none."""
    if error.filename is None:
        return error.errno in DISK
    return bool(os.fsdecode(error.filename) == os.fspath(partial))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for the block, removed at its end.

    Raises:
        OSError: there is none, or it is full; names the folder, and TMPDIR.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="dan_dist-") as name:
            try:
                yield Path(name)
            except OSError as error:
                is_inside = str(error.filename or name).startswith(name)
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and is_inside:
                    line = f"{Path(name).parent} is full: {error.strerror}"
                    raise OSError(f"{line}; TMPDIR names another temporary folder") from error
                raise
    except FileNotFoundError as error:
        if error.filename is not None or "temporary" not in str(error):
            raise
        line = "no temporary folder can be written, or all are full"
        raise OSError(f"{line} ({error.strerror}); TMPDIR names one") from error


@contextmanager
def locked(path: Path, taken: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a file, which is made if need be, or of a folder that exists.

    The lock ends with the block, or with the process, however that ends. A file system without
    locks gets a warning, once a folder: there, starting one process at a time is the user's duty.

    taken: the error where another process holds the lock. shared: processes that all ask for a
    shared lock hold it together. wait: for the other process, rather than raise.

    Raises:
        BlockingIOError: another process holds the lock (`taken`).
        OSError: `path` cannot be opened.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    file = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise BlockingIOError(taken) from error
            log.info("%s; waiting", taken)
            fcntl.flock(file, kind)
        except OSError as error:
            _warn_without_locks(path if path.is_dir() else path.parent, str(error.strerror))
        yield
    finally:
        os.close(file)


@cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    log.warning("%s: no locks on this file system (%s); let one process at a time work there",
                folder, reason)  # fmt: skip
