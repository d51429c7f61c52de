"""Shards read from HTTP and S3 servers and from folders, through a node's cache."""

import errno
import functools
import http.server
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interpreter import python

from conftest import SCRIPT, run, train
from dan_dist.data import cache
from dan_dist.data.cache import localise
from shards.format import MANIFEST, ShardSet, open_shardset
from shards.verify import verify

COPY = "from dan_dist.data.cache import localise; import sys; print(localise(*sys.argv[1:]))"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(self.path.rsplit("/", 1)[1])  # type: ignore[attr-defined]
        super().do_GET()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@pytest.fixture
def web(faces: ShardSet, tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(URL, folder, names asked for) of a copy of the faces behind an HTTP server."""
    folder = tmp_path / "served"
    shutil.copytree(faces.root, folder)
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.requests = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, server.requests  # type: ignore
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(faces: ShardSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An S3 bucket of moto's server that holds the faces."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="faces")
    for path in faces.root.iterdir():
        client.upload_file(str(path), "faces", f"sets/small/{path.name}")
    yield "s3://faces/sets/small"
    server.stop()


def same(copy: str | Path, original: ShardSet) -> bool:
    found = open_shardset(copy)
    for split in found.splits:
        found.split(split)
    return found == type(found)(**{**vars(original), "root": Path(copy)})


@pytest.mark.slow
def test_two_ranks_train_from_a_web_server_by_one_cache(
    web: tuple[str, Path, list[str]], tiny: Callable[[str], Path], tmp_path: Path, faces: ShardSet
) -> None:
    url, _, asked = web
    options = ["train.epochs=1", f"data.cache={tmp_path / 'cache'}"]
    printed = train(2, tiny("remote"), f"data.shards={url}", *options, cwd=tmp_path)
    assert "copying" in printed and "finished after 10 steps" in printed
    wanted = [shard.name for own in faces.shards.values() for shard in own]
    assert sorted(n for n in asked if n.endswith(".tar")) == sorted(wanted)  # once each
    (copy,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert same(copy, faces)
    # From the copy, and from the folder itself: the same training.
    again = train(1, tiny("again"), f"data.shards={url}", *options, cwd=tmp_path)
    local = train(1, tiny("local"), "train.epochs=1", cwd=tmp_path)
    assert "copying" not in again
    assert [x for x in again.split() if "%" in x] == [x for x in local.split() if "%" in x]


@pytest.mark.slow
def test_training_from_s3(bucket: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    printed = train(2, tiny("s3"), f"data.shards={bucket}", f"data.cache={tmp_path / 'cache'}",
                    "train.epochs=1", cwd=tmp_path)  # fmt: skip
    assert "finished after 10 steps" in printed
    elsewhere = f"{bucket}/elsewhere"
    done = run(sys.executable, "-c", COPY, elsewhere, tmp_path / "cache", cwd=tmp_path)
    assert f"FileNotFoundError: {bucket}/elsewhere/manifest.json not found" in done.stderr


def test_a_shared_folder_is_copied_too(faces: ShardSet, tmp_path: Path) -> None:
    copy = localise(str(faces.root), str(tmp_path))
    assert same(copy, faces) and localise(str(faces.root), str(tmp_path)) == copy
    assert localise(str(faces.root), None) == str(faces.root)


def test_what_an_interrupted_copy_left_is_kept(
    web: tuple[str, Path, list[str]], faces: ShardSet, tmp_path: Path
) -> None:
    url, _, asked = web
    copy = Path(localise(url, str(tmp_path / "cache")))
    (copy / MANIFEST).unlink()
    (copy / "train-01-00000.tar").unlink()
    (copy / "train-00-00000.tar").write_bytes(b"torn")
    (copy / "train-00-00000.tar.partial").write_bytes(b"torn")
    (copy / f"{MANIFEST}.0123abcd.partial").write_bytes(b"{")
    asked.clear()
    assert same(localise(url, str(tmp_path / "cache")), faces)
    assert sorted(asked) == [MANIFEST, "train-00-00000.tar", "train-01-00000.tar"]
    assert not list(copy.glob("*.partial"))


def test_processes_at_once_share_one_copy(
    web: tuple[str, Path, list[str]], faces: ShardSet, tmp_path: Path
) -> None:
    url, _, asked = web
    command = [sys.executable, "-c", COPY, url, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    copies = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(copies) == 1 and same(copies.pop(), faces)
    assert len([name for name in asked if name.endswith(".tar")]) == len(faces.shards["train"]) + 8


def test_a_set_packed_anew_is_copied_anew(faces: ShardSet, tmp_path: Path) -> None:
    source = shutil.copytree(faces.root, tmp_path / "source")
    first = localise(str(source), str(tmp_path / "cache"))
    manifest = source / MANIFEST
    manifest.write_text(manifest.read_text().replace('"synthetic"', '"other"'))
    second = localise(str(source), str(tmp_path / "cache"))
    assert first != second and open_shardset(second).dataset == "other"
    assert open_shardset(first).dataset == "synthetic"


def test_files_that_are_not_what_the_manifest_says_are_refused(
    web: tuple[str, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RETRY_S", 0.01)
    url, folder, _ = web
    tar = folder / "train-01-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match=r"train-01-00000.tar: its sha256 is .* the manifest has"):
        localise(url, str(tmp_path / "cache"))
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{url}/train-01-00000.tar not found"):
        localise(url, str(tmp_path / "cache"))
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="not a manifest of shards"):
        localise(url, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        localise("http://127.0.0.1:1", str(tmp_path / "cache"))


def test_a_short_answer_is_asked_for_again(
    web: tuple[str, Path, list[str]], faces: ShardSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cache, "RETRY_S", 0.01)
    url, _, asked = web
    origin = cache._origin

    def unreliable(source: str) -> cache.Source:
        whole, failed = origin(source), set()

        def once_torn(name: str, target: Path, limit_bytes: int) -> None:
            whole.fetch(name, target, limit_bytes)
            if name.endswith("00000.tar") and name not in failed:
                failed.add(name)
                target.write_bytes(target.read_bytes()[:100])

        return whole._replace(fetch=once_torn)

    monkeypatch.setattr(cache, "_origin", unreliable)
    assert same(localise(url, str(tmp_path / "cache")), faces)
    assert asked.count("train-01-00000.tar") == 2


@pytest.mark.parametrize(
    "source",
    ["pipe:cat /etc/passwd", "ssh://host/set", "s3://bucket::file:///etc", "file:///etc", "|ls"],
)
def test_a_url_runs_nothing_and_opens_nothing_else(source: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=r"expected a folder, or a URL|not found"):
        localise(source, str(tmp_path))


@pytest.mark.slow
def test_a_url_needs_a_cache(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.shards https://host/set is remote: set data\.cac"):
        localise("https://host/set", None)
    done = run(sys.executable, SCRIPT, tiny("x"),
               "data.shards=https://host/set", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "error: data.shards https://host/set is remote" in done.stderr


@pytest.mark.parametrize("size_kb", [100, 4])
def test_a_full_disk_says_how_much_is_needed(faces: ShardSet, tmp_path: Path, size_kb: int) -> None:
    """Too small for the set, and too small for its manifest."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = ("from dan_dist.data.cache import localise; import sys\n"
              "try: localise(*sys.argv[1:])\nexcept OSError as error: print(error)")  # fmt: skip
    (tmp_path / "fill.py").write_text(script)
    command = (f"mount -t tmpfs -o size={size_kb}k tmpfs {disk}; "
               f"{python()} fill.py {faces.root} {disk}/cache")  # fmt: skip
    done = run("unshare", "-m", "sh", "-c", command, cwd=tmp_path)
    free = f"{size_kb * 1024 / 1e6:.1f} MB are free"
    assert f"disk/cache: 0.4 MB are needed, {free}" in done.stdout, done.stderr


def test_room_is_asked_for_tars_and_not_for_the_longest_index(tmp_path: Path) -> None:
    """Of 80,000 identities, shares of all classes would be terabytes; no such index has them."""
    cache._check_space(tmp_path, [cache.FileEntry("index-train.npy", 2**60, "")])
    with pytest.raises(OSError, match="MB are needed"):
        cache._check_space(tmp_path, [cache.FileEntry("train-00-00000.tar", 2**60, "")])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_others_fill_meanwhile(
    faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    origin = cache._origin(str(faces.root))

    def full(name: str, target: Path, limit_bytes: int) -> None:
        origin.fetch(name, target, limit_bytes)
        if name == "train-01-00000.tar":
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_origin", lambda _: origin._replace(fetch=full))
        with pytest.raises(OSError, match=r"cache: the disk is full; 0\.4 MB are needed for /"):
            localise(str(faces.root), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert same(localise(str(faces.root), str(tmp_path / "cache")), faces)


def test_a_copy_without_manifest_is_read_again(faces: ShardSet, tmp_path: Path) -> None:
    copy = Path(localise(str(faces.root), str(tmp_path)))
    (copy / MANIFEST).unlink()  # the machine failed before it was written
    tar = copy / "train-01-00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(bytes(len(whole)))  # and the disk had not kept this one
    assert localise(str(faces.root), str(tmp_path)) == str(copy) and tar.read_bytes() == whole


def test_a_copy_has_no_faults(faces: ShardSet, tmp_path: Path) -> None:
    copy = localise(str(faces.root), str(tmp_path))
    assert list(verify(open_shardset(copy), workers=1)) == []
