"""What verify finds and show shows, by their commands."""

import io
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from spoiled import damaged_scans
from trees import edit_manifest, replace_index

from conftest import run
from shards import show
from shards.files import sha256_of
from shards.format import Sample, ShardSet, open_shardset, write_shard
from shards.verify import verify


def verified(root: Path) -> tuple[int, list[str]]:
    done = run(sys.executable, "-m", "shards.verify", root, "--workers", "2", cwd=root.parent)
    return done.returncode, done.stdout.splitlines()


def entry(manifest: dict, name: str) -> dict:
    return next(s for v in manifest["splits"].values() for s in v["shards"] if s["name"] == name)


def sign(root: Path, name: str) -> None:
    """Makes the manifest list a damaged shard as it is: only its content is wrong then."""
    path = root / name
    edit_manifest(root, lambda m: entry(m, name).update(
        sha256=sha256_of(path), size_bytes=path.stat().st_size))  # fmt: skip


def patch(root: Path, name: str, at: int, data: bytes) -> None:
    content = bytearray((root / name).read_bytes())
    content[at : at + len(data)] = data
    (root / name).write_bytes(content)


TAR = "train-01-00000.tar"


def row(root: Path, sample: int = 3) -> np.void:
    index = open_shardset(root).split("train").index
    return index[np.flatnonzero(index["label"] == 1)[sample]]


def link_idx(root: Path, target: str) -> None:
    path = (root / TAR).with_suffix(".idx")
    path.unlink()
    path.symlink_to(target)


def flip_a_bit(root: Path) -> None:
    at = int(row(root)["offset"]) + int(row(root)["size"]) // 2
    patch(root, TAR, at, bytes([(root / TAR).read_bytes()[at] ^ 1]))


def wrong_label(root: Path) -> None:
    patch(root, TAR, (root / TAR).read_bytes().index(b".cls") // 512 * 512 + 512, b"5")
    sign(root, TAR)


def rewrite(root: Path, jpeg: Callable[[bytes], bytes], key: str = "") -> None:
    """The shard with one image exchanged, index and signature kept as they were."""
    index = open_shardset(root).split("train").index
    own = index[index["shard"] == row(root)["shard"]]
    data = (root / TAR).read_bytes()
    samples = []
    for k, r in enumerate(own):
        image = data[r["offset"] : r["offset"] + r["size"]]
        name = data[r["offset"] - 512 :][:100].split(b".")[0].decode()
        samples.append(Sample(key if key and k == 3 else name, jpeg(image) if k == 3 else image, 1))
    write_shard(root / TAR, samples)
    sign(root, TAR)


def exchange(root: Path, jpeg: Callable[[bytes], bytes]) -> None:
    """The shard with one image exchanged and everything signed anew: only decoding finds it."""
    rewrite(root, jpeg)
    index = np.load(root / "index-train.npy")
    own = index["shard"] == row(root)["shard"]
    with tarfile.open(root / TAR) as tar:
        images = [m for m in tar if m.name.endswith(".jpg")]
    data = (root / TAR).read_bytes()
    index["offset"][own] = [m.offset_data for m in images]
    index["size"][own] = [m.size for m in images]
    index["crc32"][own] = [zlib.crc32(data[m.offset_data :][: m.size]) for m in images]
    replace_index(root, index)


def spoil(kind: str) -> Callable[[Path], None]:
    return lambda root: exchange(root, lambda jpeg: damaged_scans(jpeg)[kind])


def bomb(_: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (20_000, 5_001)).save(buffer, "JPEG")
    return buffer.getvalue()


def header(root: Path, **fields: object) -> None:
    """Another header for the shard's first member."""
    info = tarfile.TarInfo("face.jpg")
    for name, value in fields.items():
        setattr(info, name, value)
    patch(root, TAR, 0, info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
    sign(root, TAR)


def another_index(root: Path) -> None:
    index = np.load(root / "index-train.npy")
    index["crc32"][5] ^= 1
    np.save(root / "index-train.npy", index)


def moved_offset(root: Path) -> None:
    index = np.load(root / "index-train.npy")
    index["offset"][5] += 512
    np.save(root / "index-train.npy", index)


def small(_: bytes) -> bytes:
    from shards.images import encode

    return encode(Image.new("RGB", (16, 16)))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lambda r: (r / TAR).unlink(), f"{TAR}: missing"),
    "a short shard": (lambda r: (r / TAR).write_bytes((r / TAR).read_bytes()[:-512]),
                      "bytes, the manifest lists"),
    "a flipped bit": (flip_a_bit, f"{TAR}: its sha256 differs"),
    "a cut image": (spoil("cut"), "cannot be decoded: Corrupt JPEG data: premature end"),
    "a zeroed image": (spoil("zeros"), "cannot be decoded: Corrupt JPEG data"),
    "a noisy image": (spoil("noise"), "cannot be decoded: Corrupt JPEG data"),
    "an empty image": (spoil("no scan"), "cannot be decoded: Corrupt JPEG data: premature end"),
    "no table": (spoil("no table"), "cannot be decoded: Quantization table"),
    "an image bomb": (lambda r: exchange(r, bomb), "its image has (20000, 5001) pixels, at most"),
    "a link in a tar": (lambda r: header(r, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
                        f"{TAR}: 'face.jpg' is no file"),
    "a path in a tar": (lambda r: header(r, name="/etc/passwd", size=9), "key '/etc/passwd' must"),
    "a key of any bytes": (lambda r: header(r, name="\udce9.jpg", size=9), "key '\\udce9' must"),
    "a negative size": (lambda r: header(r, size=-1024), "no readable tar: 'face.jpg' has a size"),
    "a folder for a tar": (lambda r: ((r / TAR).unlink(), (r / TAR).mkdir()), f"{TAR}: missing"),
    "a wrong label": (wrong_label, "label 5, the index has 1 and the manifest 1"),
    "an image of another size": (lambda r: rewrite(r, small), "its image has (16, 16) pixels"),
    "junk after an image": (lambda r: rewrite(r, lambda j: j + b"x"), "its image is no plain JPEG"),
    "a key twice": (lambda r: rewrite(r, lambda j: j, "face_0000000"), "1 keys stand there twice"),
    "a missing .idx": (lambda r: (r / TAR).with_suffix(".idx").unlink(), ".idx: missing"),
    "another .idx": (lambda r: (r / TAR).with_suffix(".idx").write_text("v1.2 0\n"),
                     ".idx: differs from its tar"),
    "an endless .idx": (lambda r: link_idx(r, "/proc/kmsg"), ".idx: "),
    "a large .idx": (lambda r: link_idx(r, "/dev/zero"), ".idx: "),
    "another index": (another_index, "index-train.npy: its sha256 differs"),
    "an index that points elsewhere": (moved_offset, "its image stands at"),
    "no index": (lambda r: (r / "index-train.npy").unlink(), "index-train.npy not found"),
    "a shard too many": (lambda r: shutil.copy(r / TAR, r / "train-09-00000.tar"),
                         "train-09-00000.tar: not part of the set"),
    "no tar": (lambda r: ((r / TAR).write_bytes(b"x" * 102400), sign(r, TAR)), "no readable tar"),
    "other counts": (lambda r: edit_manifest(r, lambda m: m["splits"]["train"]["counts"].reverse()),
                     "samples by class, the manifest lists"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_planted_damage_is_found_and_named(kind: str, faces: ShardSet, tmp_path: Path) -> None:
    root = shutil.copytree(faces.root, tmp_path / "shards")
    damage, expected = DAMAGE[kind]
    damage(root)
    faults = list(verify(open_shardset(root), workers=1))
    assert any(expected in fault for fault in faults), faults


def test_the_command_names_each_fault_and_counts_them(faces: ShardSet, tmp_path: Path) -> None:
    root = shutil.copytree(faces.root, tmp_path / "shards")
    (root / TAR).unlink()
    wrong = root / "train-00-00000.idx"
    wrong.write_text("")
    expected = ["train-00-00000.idx: differs from its tar", f"{TAR}: missing", "2 faults"]
    code, lines = verified(root)
    assert code == 1 and sorted(lines[:-1]) == expected[:-1] and lines[-1] == expected[-1]


def test_metadata_are_read(tmp_path: Path, faces: ShardSet) -> None:
    root = shutil.copytree(faces.root, tmp_path / "shards")
    own = open_shardset(root).split("train").index
    data = (root / TAR).read_bytes()
    samples = [
        Sample(f"k{k}", data[r["offset"] : r["offset"] + r["size"]], 1, {"valence": "x" * 10**5})
        for k, r in enumerate(own[own["shard"] == row(root)["shard"]])
    ]
    write_shard(root / TAR, samples)
    first = (root / TAR).read_bytes().index(b'{"valence"')
    patch(root, TAR, first, b"[")
    patch(root, TAR, (root / TAR).read_bytes().index(b'{"valence"'), b"[" * 10**5)
    sign(root, TAR)
    faults = list(verify(open_shardset(root), workers=1))
    for key in ("k0", "k1"):
        assert any(f"{key}: its metadata are no JSON" in fault for fault in faults), faults


def test_a_whole_set_has_no_faults(faces: ShardSet) -> None:
    assert verified(faces.root) == (0, [f"{faces.root}: 96 images, all as they should be"])


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    for command in ("verify", "show"):
        done = run(sys.executable, "-m", f"shards.{command}", tmp_path, cwd=tmp_path)
        assert done.returncode == 2 and "no finished shards there" in done.stderr


def test_show_draws_each_class(faces: ShardSet, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shards.show", faces.root, "--out", tmp_path / "sheets"]
    done = run(*command, "--split", "val", "--images", "30", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["class", "train", "val"]
    counts = faces.counts["train"]
    assert ["contempt", str(counts[7]), "2"] in [x.split() for x in done.stdout.splitlines()]
    sheets = sorted((tmp_path / "sheets").glob("*.png"))
    assert [p.stem for p in sheets][:2] == ["val-00-neutral", "val-01-happy"]
    for path in sheets:
        with path.open("rb") as file:
            width, height = struct.unpack(">II", file.read(24)[16:])
        assert (width, height) == (12 * 32, 24 + 32)
    assert "no split 'test'" in run(*command, "--split", "test", cwd=tmp_path).stderr


def test_show_marks_what_is_damaged(faces: ShardSet, tmp_path: Path) -> None:
    root = shutil.copytree(faces.root, tmp_path / "shards")
    exchange(root, lambda jpeg: jpeg[:-2] + b"??")
    assert show.main([str(root), "--out", str(tmp_path / "sheets")]) == 0
    sheet = Image.open(tmp_path / "sheets" / "train-01-happy.png").convert("RGB")
    reds = [k for k in range(12) if sheet.getpixel((k * 112 + 100, 24 + 100)) == (255, 0, 0)]
    assert reds == [3]
    show.overview(open_shardset(root), tmp_path / "overview.png")


def test_show_draws_the_classes_asked_for(
    faces: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheets = tmp_path / "sheets"
    assert show.main([str(faces.root), "--out", str(sheets), "--classes", "3"]) == 0
    assert "5 more classes; --classes 8 draws them all" in capsys.readouterr().out
    assert len(list(sheets.iterdir())) == 3
    assert show.main([str(faces.root), "--images", "0"]) == 2
    assert capsys.readouterr().err == "error: --images 0: expected at least 1\n"
