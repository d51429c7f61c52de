"""Atomic writes, checksums and locks, for every writer of a folder."""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

# What is wrong with a disk, not with what is written to it
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes `path` as `replacing` does: it is whole or absent."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


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


def _is_of(error: OSError, partial: Path) -> bool:
    """Whether an error names a file that nobody knows, or, as that of a write does, none."""
    if error.filename is None:
        return error.errno in DISK
    return bool(os.fsdecode(error.filename) == os.fspath(partial))


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
