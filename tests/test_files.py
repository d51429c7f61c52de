"""Atomic writes and locks: against failing disks, real other processes, and disks without locks."""

import errno
import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from conftest import REPOSITORY
from shards import files
from shards.files import locked, replacing, scratch_folder, sha256_of, write_atomically

# Takes a lock as argv has it, prints "held" and waits to be killed, or for its standard input's end
HOLDER = """
import sys
from pathlib import Path
from shards.files import locked
with locked(Path(sys.argv[1]), "taken", shared="shared" in sys.argv, wait="wait" in sys.argv):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, *how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that asks for the lock of `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, *how], text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_held(process: subprocess.Popen[str]) -> bool:
    """Whether the process got the lock; False: it ended without."""
    assert process.stdout is not None
    return process.stdout.readline() == "held\n"


@pytest.fixture(params=["file", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What is locked: a file that is not there yet, or a folder that is."""
    if request.param == "folder":
        (tmp_path / "folder").mkdir()
    return tmp_path / request.param


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        (partial,) = tmp_path.glob("file.????????.partial")
    assert path.read_text() == "new" and not partial.exists()
    write_atomically(path, "café")
    assert path.read_bytes() == "café".encode()
    write_atomically(tmp_path / "other", b"\0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]
    assert sha256_of(path) == hashlib.sha256("café".encode()).hexdigest()


def raise_in_block(file: BinaryIO) -> None:
    raise KeyboardInterrupt


def fill_the_disk(file: BinaryIO) -> None:
    """The next write that reaches the disk fails, as on a full one."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.fileno())
    os.close(full)


@pytest.mark.parametrize(
    ("fail", "error"), [(raise_in_block, KeyboardInterrupt), (fill_the_disk, OSError)]
)
@pytest.mark.parametrize("old", [None, "old"])
def test_after_an_error_the_old_file_stands_and_no_other(
    tmp_path: Path, fail: Callable[[BinaryIO], None], error: type[BaseException], old: str | None
) -> None:
    path = tmp_path / "file"
    if old:
        path.write_text(old)
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        fail(file)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_after_a_kill_the_old_file_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom shards.files import replacing\n"
        "with replacing(Path('file')) as file:\n"
        "    file.write(b'half')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == -signal.SIGKILL and (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.glob("file.????????.partial"))) == 1


def test_file_and_folder_are_flushed_to_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(file: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"
        flushed.append((kind, (tmp_path / "file").exists()))
        fsync(file)
        if kind == "folder":
            raise OSError(errno.EINVAL, "not on this network file system")

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(tmp_path / "file", "content")
    assert flushed == [("file", False), ("folder", True)]


def test_a_lock_keeps_another_process_out(place: Path) -> None:
    with holder(place) as first:
        assert wait_until_held(first)
        for shared in (True, False):
            with (
                pytest.raises(BlockingIOError, match="in use"),
                locked(place, "in use", shared=shared),
            ):
                pass
        first.communicate("")  # it leaves its block
        with locked(place, "in use"), holder(place) as second:
            assert not wait_until_held(second) and second.wait() == 1


def test_a_lock_ends_with_a_killed_process(place: Path) -> None:
    with holder(place) as process:
        assert wait_until_held(process)
        process.kill()
        process.wait()
        with locked(place, "in use"):
            pass


def test_shared_locks_hold_together_and_keep_others_out(place: Path) -> None:
    with holder(place, "shared") as process, locked(place, "in use", shared=True):
        assert wait_until_held(process)
        with pytest.raises(BlockingIOError, match="in use"), locked(place, "in use"):
            pass


def test_a_lock_may_be_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ExitStack()
    ours.enter_context(locked(place, "in use"))
    with holder(place, "wait") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        ours.close()
        assert wait_until_held(process)
        lines: list[tuple[str, str]] = []
        monkeypatch.setattr(files.log, "info", lambda *line: (lines.append(line), process.kill()))
        with locked(place, "in use", wait=True):
            assert process.wait() == -signal.SIGKILL
    assert lines == [("%s; waiting", "in use")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once_a_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(file: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = []
    for _ in range(3):
        with locked(place, "in use"), locked(place, "in use", shared=True):
            done.append(True)
    folder = place if place.is_dir() else place.parent
    warning = f"{folder}: no locks on this file system ({os.strerror(number)}); let one process at"
    assert len(done) == 3 and caplog.text.count(warning) == len(caplog.records) == 1
    with locked(folder / "another.lock", "in use", wait=True):
        assert len(caplog.records) == 1  # of the same folder
    (folder / "inner").mkdir()
    with locked(folder / "inner", "in use"):
        assert len(caplog.records) == 2


def test_a_lock_in_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "no" / "lock", "in use"):
        pass


def test_a_temporary_folder_that_is_full_or_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full = f"^{tmp_path} is full: No space left on device; TMPDIR names another temporary folder$"
    for inside in (None, "image.jpg"):
        with pytest.raises(OSError, match=full), scratch_folder() as folder:
            name = () if inside is None else (str(folder / inside),)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *name)
    with pytest.raises(OSError, match="No space left on device: '/else/where'"), scratch_folder():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/else/where")
    with pytest.raises(FileNotFoundError, match=r"x\.jpg"), scratch_folder():
        raise FileNotFoundError(errno.ENOENT, "x.jpg")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    none = r"^no temporary folder .*/proc/nowhere.*; TMPDIR names one$"
    with pytest.raises(OSError, match=none), scratch_folder():
        pass
