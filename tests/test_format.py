"""The on-disk format: the index, WebDataset, DALI; damaged sets are refused by name."""

import hashlib
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from trees import CLASSES, edit_manifest

from conftest import run
from shards.format import MANIFEST, open_shardset
from shards.index import index_dtype


def test_every_image_is_where_the_index_says(shards: Path) -> None:
    opened = open_shardset(shards)
    assert opened.class_names == CLASSES and opened.image_size == 24
    assert opened.counts == {"train": (9, 9), "val": (3, 3)}
    split = opened.split("train")
    assert split.index.dtype == index_dtype(0, grouped=True) and not split.index.flags.writeable
    sources = {p.read_bytes() for p in (shards.parent / "source" / "train").rglob("*.jpg")}
    for sample, row in enumerate(split.index):
        data = split.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert data in sources  # the original bytes
        assert zlib.crc32(data) == row["crc32"]
        assert split.shards[row["shard"]].label == row["label"]
        assert f"/{CLASSES[row['label']]}_" in split.key(sample)
    for shard in split.shards:
        content = (shards / shard.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        assert len(content) == shard.size_bytes


def test_webdataset_reads_the_tars(shards: Path) -> None:
    split = open_shardset(shards).split("train")
    urls = [str(shards / s.name) for s in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(split)
    for sample, row in zip(samples, split.index, strict=True):
        assert zlib.crc32(sample["jpg"]) == row["crc32"]
        assert int(sample["cls"]) == row["label"]


def test_dali_reads_the_tars_by_their_idx(shards: Path) -> None:
    split = open_shardset(shards).split("train")

    @pipeline_def(batch_size=len(split), num_threads=1, device_id=None)
    def reader():  # type: ignore[no-untyped-def]
        return tuple(
            fn.readers.webdataset(
                paths=[str(shards / s.name) for s in split.shards],
                index_paths=[str(shards / s.name.replace(".tar", ".idx")) for s in split.shards],
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
        )

    jpegs, labels = reader().run()
    assert [zlib.crc32(bytes(np.asarray(x))) for x in jpegs] == split.index["crc32"].tolist()
    assert [int(bytes(np.asarray(x))) for x in labels] == split.index["label"].tolist()


def test_the_idx_is_what_dalis_own_tool_writes(shards: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    if not tool.exists():
        pytest.skip("this DALI comes without wds2idx")
    for tar in sorted(shards.glob("*.tar")):
        done = run(tool, tar, tmp_path / "theirs.idx", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        theirs = (tmp_path / "theirs.idx").read_text().split()
        assert tar.with_suffix(".idx").read_text().split() == theirs


def test_damaged_sets_are_refused_by_name(shards: Path) -> None:
    tar = shards / "train-01-00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    expected = rf"{tar.name} holds {len(whole) - 512} bytes, the manifest lists {len(whole)}"
    with pytest.raises(ValueError, match=expected):
        open_shardset(shards).split("train")
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tar.name} not found"):
        open_shardset(shards).split("train")
    tar.write_bytes(whole)
    index = np.load(shards / "index-train.npy")
    np.save(shards / "index-train.npy", index[:-1])
    with pytest.raises(ValueError, match=r"index-train\.npy: .* the manifest lists 18 samples"):
        open_shardset(shards).split("train")
    with pytest.raises(ValueError, match="no split 'test', it has train, val"):
        open_shardset(shards).split("test")


@pytest.mark.parametrize("name", ["../elsewhere.tar", "/etc/passwd", ".."])
def test_a_manifest_cannot_name_files_elsewhere(shards: Path, name: str) -> None:
    edit_manifest(shards, lambda m: m["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(ValueError, match="is not a plain file name"):
        open_shardset(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(class_names="ab"),
        lambda m: m.update(image_size="big"),
        lambda m: m["splits"]["train"].update(counts=[9]),
        lambda m: m["splits"]["train"]["shards"][0].update(samples="4"),
        lambda m: m["splits"]["train"]["shards"][0].update(label=2),
    ],
)
def test_manifest_values_of_a_wrong_kind_are_refused(
    shards: Path, change: Callable[[dict], object]
) -> None:
    edit_manifest(shards, change)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards: .*"):
        open_shardset(shards)


def first_shard(**values: object) -> Callable[[dict], object]:
    return lambda m: m["splits"]["train"]["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.update(dataset="x\x1b[2J"), r"dataset holds 'x\\x1b"),
        (lambda m: m.update(release="a\nb"), r"release holds 'a\\nb'"),
        (lambda m: m["class_names"].__setitem__(0, "\x9b31m"), r"class_names holds '\\x9b31m'"),
        (lambda m: m["splits"].update({"\x07": m["splits"].pop("val")}), r"splits holds '\\x07'"),
        (lambda m: m.update(dropped={"\u202e": 1}), r"dropped holds '\\u202e'"),
        (lambda m: m.update(dropped={"too small": "\x1b"}), "dropped holds what is no number"),
        (lambda m: m["splits"]["val"].update(index_sha256="\x1b"), r"index holds '\\x1b'"),
        (first_shard(sha256="\r"), r"sha256 holds '\\r'"),
        (first_shard(sha256=7), "sha256 holds 7"),
        (first_shard(**{"odd\x1b[31m": 1}), r"unexpected keyword argument 'odd\\x1b\[31m'"),
        (first_shard(samples=10**9), r"1000000000 samples in \d+ bytes"),
    ],
)
def test_a_manifest_gives_a_terminal_no_orders_and_samples_have_their_bytes(
    shards: Path, change: Callable[[dict], object], line: str
) -> None:
    edit_manifest(shards, change)
    with pytest.raises(ValueError, match=rf"manifest\.json: not a manifest .*{line}") as raised:
        open_shardset(shards)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard", -1), ("label", 2), ("size", 0), ("offset", -1), ("offset", 2**63 - 2)],
)
def test_index_values_out_of_range_are_refused(shards: Path, field: str, value: int) -> None:
    index = np.load(shards / "index-train.npy")
    index[field][3] = value
    np.save(shards / "index-train.npy", index)
    with pytest.raises(ValueError, match=rf"{field} {value}, expected 0 to|outside its shard"):
        open_shardset(shards).split("train")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x93NUMPY\x01\x00\x04\x00{[[["])
def test_a_file_that_is_no_index_is_refused(shards: Path, content: bytes) -> None:
    (shards / "index-train.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"index-train\.npy: not an index"):
        open_shardset(shards).split("train")


def test_a_broken_manifest_is_refused(shards: Path) -> None:
    edit_manifest(shards, lambda m: m.pop("class_names"))
    with pytest.raises(ValueError, match=r"manifest\.json: .*'class_names' is missing"):
        open_shardset(shards)
    (shards / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards"):
        open_shardset(shards)
