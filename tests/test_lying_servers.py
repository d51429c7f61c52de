"""Remote sets from servers that lie, fail, or take their time, and caches of other users."""

import errno
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from interpreter import python
from trees import edit_manifest
from web import Server

from conftest import REPOSITORY, run
from dan_dist.data import cache
from dan_dist.data.cache import LocalError, TooLongError, localise
from shards.format import MANIFEST, MANIFEST_BYTES, ShardSet, open_shardset

SLACK_BYTES = 48 * 2**20  # that sockets and libraries may have taken beside what was written


@pytest.fixture
def web(faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of a copy of the faces, which tells the truth until it is told otherwise."""
    monkeypatch.setattr(cache, "RETRY_S", 0.01)
    with Server(Path(shutil.copytree(faces.root, tmp_path / "served"))) as server:
        yield server


@pytest.mark.parametrize("name", [MANIFEST, "index-val.npy", "train-01-00000.tar"])
def test_a_body_without_end_takes_no_more_than_the_file_may_have(
    web: Server, faces: ShardSet, tmp_path: Path, name: str
) -> None:
    web.ill = lambda asked, _: "endless" if asked == name else ""
    with pytest.raises(
        TooLongError, match=rf"{web.url}/{name}: it goes on after [\d,]+ bytes, the"
    ):
        localise(web.url, str(tmp_path / "cache"))
    allowed = MANIFEST_BYTES if name == MANIFEST else 10**6
    assert web.sent < allowed + SLACK_BYTES and web.asked.count(name) == 1
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert sum(p.stat().st_size for p in kept) < 10**6
    assert not list((tmp_path / "cache").rglob(f"{name}*"))
    web.ill = lambda *_: ""
    assert open_shardset(localise(web.url, str(tmp_path / "cache"))).counts == faces.counts


@pytest.mark.parametrize("ill", [500, 503, 429, "cut"])
@pytest.mark.parametrize("name", [MANIFEST, "train-01-00000.tar"])
def test_one_bad_answer_is_asked_for_again(
    web: Server, faces: ShardSet, tmp_path: Path, name: str, ill: str | int
) -> None:
    web.ill = lambda asked, time: ill if asked == name and time < cache.ATTEMPTS else ""
    assert open_shardset(localise(web.url, str(tmp_path / "cache"))).counts == faces.counts
    assert web.asked.count(name) == cache.ATTEMPTS


@pytest.mark.parametrize("name", [MANIFEST, "val-03-00000.tar"])
def test_a_server_that_fails_for_good_is_named_with_its_words(
    web: Server, tmp_path: Path, name: str
) -> None:
    web.ill = lambda asked, _: 500 if asked == name else ""
    with pytest.raises(OSError, match=rf"{web.url}/{name}: .*500, message='Internal Server Error'"):
        localise(web.url, str(tmp_path / "cache"))


def test_a_file_may_take_as_long_as_it_comes(
    web: Server, faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp's deadline for a whole file, 300 s, is half a second here."""
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    monkeypatch.setattr(cache, "READ_S", 7.0)  # a session of its own
    web.ill = lambda name, _: "slow" if name in (MANIFEST, "train-01-00000.tar") else ""
    assert open_shardset(localise(web.url, str(tmp_path / "cache"))).counts == faces.counts
    assert web.asked.count("train-01-00000.tar") == 1


@pytest.mark.parametrize("name", [MANIFEST, "train-00-00000.tar"])
def test_a_server_that_goes_silent_is_left(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cache, "READ_S", 0.1)
    web.ill = lambda asked, _: "silent" if asked == name else ""
    with pytest.raises(OSError, match=rf"{web.url}/{name}: no answer in time"):
        localise(web.url, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "x: no answer in time"),
        (OSError(), "x: OSError"),
        (RuntimeError(), "x: RuntimeError: RuntimeError"),
        (OSError("https://ann:pw@h is down"), r"x: https://\*\*\*@h is down"),
    ],
)
def test_every_reason_has_words(error: Exception, words: str) -> None:
    with pytest.raises(OSError, match=f"^{words}$"), cache._naming("x"):
        raise error


def test_an_error_of_the_caches_disk_names_it_and_is_not_tried_again(
    faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = list[object]()

    def fail(file: object) -> int:
        failed.append(file)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = io.BytesIO()
    out.write = fail  # type: ignore[method-assign, assignment]
    to_disk = cache._Bounded(out, tmp_path / "x.partial", 9)
    with (
        pytest.raises(LocalError, match=rf"Input/output error: '{tmp_path}/x\.partial'"),
        cache._naming("https://host/x"),
    ):
        to_disk.write(b"abc")
    with pytest.raises(LocalError, match=r"/nowhere/x\.partial"):
        cache._origin(str(faces.root)).fetch(MANIFEST, tmp_path / "nowhere" / "x.partial", 9)
    failed.clear()
    monkeypatch.setattr(os, "fsync", lambda fd: fail(Path(f"/proc/self/fd/{fd}").readlink()))
    monkeypatch.setattr(cache, "THREADS", 1)
    with pytest.raises(LocalError, match=rf"error: '{tmp_path}/cache/.*\.partial'"):
        localise(str(faces.root), str(tmp_path / "cache"))
    tried = [str(path).rsplit(".", 2)[0] for path in failed]  # without what ends a partial name
    assert tried and len({*tried}) == len(tried)  # some others may have begun, none twice


def test_a_whole_cache_needs_no_lock(faces: ShardSet, tmp_path: Path) -> None:
    """On a read-only file system, and where the lock is another user's."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    copy = localise(str(faces.root), str(tmp_path / "cache"))
    for path in (tmp_path / "cache").glob("*.lock"):
        path.unlink()
    script = "from dan_dist.data.cache import localise; import sys; print(localise(*sys.argv[1:]))"
    (tmp_path / "again.py").write_text(script)
    again = f"{python()} {tmp_path / 'again.py'} {faces.root} {tmp_path / 'cache'}"
    mounted = f"mount --bind {tmp_path / 'cache'} {tmp_path / 'cache'} && mount -o remount,ro,bind "
    done = run("unshare", "-m", "sh", "-c", f"{mounted} {tmp_path / 'cache'} && {again}",
               cwd=REPOSITORY)  # fmt: skip
    assert done.stdout.strip() == copy, done.stderr
    assert not list((tmp_path / "cache").glob("*.lock"))


def test_a_copy_with_another_manifest_is_mended(faces: ShardSet, tmp_path: Path) -> None:
    copy = Path(localise(str(faces.root), str(tmp_path / "cache")))
    edit_manifest(copy, lambda m: m.update(image_size=None))
    assert localise(str(faces.root), str(tmp_path / "cache")) == str(copy)
    assert (copy / MANIFEST).read_bytes() == (faces.root / MANIFEST).read_bytes()


@pytest.mark.parametrize("name", [MANIFEST, "val-03-00000.tar"])
def test_a_pipe_in_a_folder_is_no_file(faces: ShardSet, tmp_path: Path, name: str) -> None:
    """Nothing may ever come out of it."""
    source = Path(shutil.copytree(faces.root, tmp_path / "source"))
    (source / name).unlink()
    subprocess.run(["mkfifo", source / name], check=True)
    with pytest.raises(FileNotFoundError, match=rf"{source / name} not found"):
        localise(str(source), str(tmp_path / "cache"))
    (source / name).unlink()
    (source / name).symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match=rf"{source / name} not found"):
        localise(str(source), str(tmp_path / "cache"))
