"""The on-disk format, both ways: WebDataset tars, DALI indexes, one array index, one manifest.

A folder holds, for each split, `<split>-<label>-<number>.tar` (members `<key>.jpg`, `<key>.cls`,
`<key>.json` where there is metadata), beside each tar DALI's text index `.idx`, one
`index-<split>.npy` that every rank reads into memory, and `manifest.json`, written last: a folder
with a manifest is complete.
"""

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.command import is_printable, words
from shards.cut import cut_of_manifest
from shards.files import read_bounded, replacing, sha256_of, write_atomically
from shards.index import INDEX_DTYPE, check_present, npy_bytes, read_index

FORMAT = "dan_dist shards, version 1"
MANIFEST = "manifest.json"
DRAWN = "synthetic"  # the data set of drawn faces
MANIFEST_BYTES = 64 * 2**20  # at most; 300,000 shards take as many
MAX_KEY = 90  # bytes: a USTAR header has 100 for `<key>.json`


class Sample(NamedTuple):
    """One image as it goes into a tar."""

    key: str  # unique within its split; see check_key
    jpeg: bytes
    label: int
    meta: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Shard:
    """One tar, as the manifest describes it."""

    name: str
    label: int | None  # None where labels are mixed
    samples: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The samples of one split, opened for random access."""

    name: str
    root: Path
    shards: tuple[Shard, ...]
    index: NDArray[Any]  # (samples,) index_dtype, read-only; offset and size are the JPEG's
    class_names: tuple[str, ...]
    image_size: int | None  # pixels, where all images are squares of one size

    def __len__(self) -> int:
        return len(self.index)

    def path(self, shard: int) -> Path:
        """The tar of shard number `shard`."""
        return self.root / self.shards[shard].name

    def encoded(self, sample: int) -> bytes:
        """The file of a sample's image, as it was packed; it is not checked."""
        row = self.index[sample]
        with self.path(row["shard"]).open("rb") as file:
            file.seek(int(row["offset"]))
            return file.read(int(row["size"]))

    def key(self, sample: int) -> str:
        """`<shard>/<key>` of a sample, read from the tar header before its payload."""
        row = self.index[sample]
        with self.path(row["shard"]).open("rb") as file:
            return f"{self.shards[row['shard']].name}/{_key_at(file, int(row['offset']))}"

    def name_of(self, sample: int) -> str:
        """`<split>/<key>` of a sample, for people."""
        return f"{self.name}/{self.key(sample).split('/', 1)[-1]}"

    def class_of(self, sample: int) -> str:
        """The name of a sample's class."""
        return self.class_names[int(self.index["label"][sample])]

    def keys(self) -> Iterator[str]:
        """The key of every sample, without its shard, in the order of the index."""
        runs = np.split(self.index, np.flatnonzero(np.diff(self.index["shard"])) + 1)
        for rows in filter(len, runs):  # of an empty split, the one run is empty
            with self.path(rows["shard"][0]).open("rb") as file:
                yield from (_key_at(file, offset) for offset in rows["offset"].tolist())


def _key_at(file: BinaryIO, offset: int) -> str:
    """The key of the member whose payload begins at `offset`."""
    file.seek(offset - tarfile.BLOCKSIZE)
    name = file.read(100).split(b"\0")[0].decode("utf-8", "replace")
    return name.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Manifest:
    """A manifest to be written, in the order of the file."""

    dataset: str
    release: str
    class_names: tuple[str, ...]
    image_size: int | None  # pixels, where all images are squares of one size
    face_cut: str  # how faces were cut out of photographs, see shards.cut
    image_policy: str  # how images were made fit
    splits: Mapping[str, Any]  # as `write_index` describes them
    dropped: Mapping[str, int]  # reason → images of the release that were not packed
    dropped_names: list[str]  # of some of those images
    pack_sha256: str  # of the plan: packing the same again finds nothing to be done


@dataclass(frozen=True)
class ShardSet:
    """A finished folder of shards, as its manifest describes it."""

    root: Path
    dataset: str
    release: str
    class_names: tuple[str, ...]
    image_size: int | None  # pixels, where all images are squares of one size
    fingerprint: str  # sha256 over what determines the samples; the same wherever the folder lies
    counts: dict[str, tuple[int, ...]]  # split → samples of each class
    shards: dict[str, tuple[Shard, ...]]
    index_names: dict[str, str]
    index_sha256: dict[str, str]
    dropped: dict[str, int]  # reason → images of the release that were not packed
    face_cut: str | None  # see shards.cut; None: the manifest of a former version does not tell

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.shards)

    def split(self, name: str) -> Split:
        """Opens one split; checks its index by sha256, its tars by their sizes, and reads no tar.

        Raises:
            FileNotFoundError: a tar or the index is missing.
            ValueError: no such split, a tar of another size, or an index that was not packed here.
        """
        if name not in self.shards:
            raise ValueError(f"{self.root}: no split '{name}', it has {', '.join(self.splits)}")
        shards = self.shards[name]
        for shard in shards:
            path = self.root / shard.name
            check_present(path)
            if (actual := path.stat().st_size) != shard.size_bytes:
                raise ValueError(
                    f"{path} holds {actual} bytes, the manifest lists {shard.size_bytes}: "
                    "the copy is incomplete, copy or pack it again"
                )
        path, listed = self.root / self.index_names[name], self.index_sha256[name]
        sizes, counts = [shard.size_bytes for shard in shards], self.counts[name]
        index, sha256 = read_index(path, sizes, sum(counts), len(counts))
        if sha256 != listed:
            raise ValueError(
                f"{path}: its sha256 is {sha256}, the manifest lists {listed}: it is not the index "
                "that was packed, copy or pack the whole set again"
            )
        return Split(name, self.root, shards, index, self.class_names, self.image_size)


def open_shardset(root: str | Path) -> ShardSet:
    """Reads a folder's manifest.

    Raises:
        FileNotFoundError: no manifest: nothing was packed there, or packing has not finished.
        ValueError: the manifest is of another format, incomplete, or names files elsewhere.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: no finished shards there; make them with python -m shards.pack"
        )
    return parse_manifest(Path(root), read_bounded(path, MANIFEST_BYTES))


def parse_manifest(root: Path, content: bytes) -> ShardSet:
    """The set that a manifest describes, to be found in `root`.

    Raises:
        ValueError: the manifest is of another format, incomplete, or names files elsewhere.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, expected {FORMAT!r}")
        if not isinstance(manifest["class_names"], list):
            raise ValueError(f"class_names is {manifest['class_names']!r}, expected a list")
        splits = manifest["splits"]
        result = ShardSet(
            root=root,
            dataset=str(manifest["dataset"]),
            release=str(manifest["release"]),
            class_names=tuple(manifest["class_names"]),
            image_size=manifest["image_size"],
            fingerprint=_fingerprint(manifest),
            counts={n: tuple(v["counts"]) for n, v in splits.items()},
            shards={n: tuple(Shard(**s) for s in v["shards"]) for n, v in splits.items()},
            index_names={n: v["index"] for n, v in splits.items()},
            index_sha256={n: str(v["index_sha256"]) for n, v in splits.items()},
            dropped=dict(manifest["dropped"]),
            face_cut=cut_of_manifest(manifest),
        )
        _check_values(result)
    except KeyError as error:
        raise ValueError(f"{path}: not a manifest of shards: {error} is missing") from error
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest of shards: {words(error)}") from error
    return result


def _check_values(found: ShardSet) -> None:
    """JSON holds any type, and a manifest may come from elsewhere."""
    classes, shards = len(found.class_names), [s for v in found.shards.values() for s in v]
    for name in [s.name for s in shards] + [*found.index_names.values()]:
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise ValueError(f"{name!r} is not a plain file name")
    if not classes or not all(isinstance(name, str) for name in found.class_names):
        raise ValueError(f"class_names is {list(found.class_names)}, expected a list of names")
    _check_printable(found)
    if not all(map(_is_whole, found.dropped.values())):
        raise ValueError("dropped holds what is no number of images")
    if found.image_size is not None and (not _is_whole(found.image_size) or not found.image_size):
        raise ValueError(f"image_size is {found.image_size!r}, expected pixels or null")
    for shard in shards:
        if not _is_whole(shard.samples) or not _is_whole(shard.size_bytes):
            raise ValueError(f"{shard.name}: samples and size_bytes must be whole numbers")
        if shard.samples * 2 * tarfile.BLOCKSIZE > shard.size_bytes:  # headers of image and label
            raise ValueError(f"{shard.name}: {shard.samples} samples in {shard.size_bytes} bytes")
        if shard.label is not None and not (_is_whole(shard.label) and shard.label < classes):
            raise ValueError(f"{shard.name}: label {shard.label!r}, there are {classes} classes")
    for split, counts in found.counts.items():
        samples = sum(shard.samples for shard in found.shards[split])
        if len(counts) != classes or not all(map(_is_whole, counts)) or sum(counts) != samples:
            expected = f"{classes} classes and {samples} samples, as its shards are"
            raise ValueError(f"counts of '{split}' are not of {expected}")


def _check_printable(found: ShardSet) -> None:
    """What commands print of a manifest must not be what a terminal obeys."""
    for kind, names in {
        "dataset": [found.dataset], "release": [found.release], "class_names": found.class_names,
        "splits": found.shards, "dropped": found.dropped, "index": found.index_sha256.values(),
        "sha256": [shard.sha256 for own in found.shards.values() for shard in own],
    }.items():  # fmt: skip
        if odd := [name for name in names if not isinstance(name, str) or not is_printable(name)]:
            raise ValueError(f"{kind} holds {odd[0]!r}, expected printable text")


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    """Class names and the indexes' checksums (which hold every image's crc32) fix the samples."""
    indexes = [(name, split["index_sha256"]) for name, split in manifest["splits"].items()]
    return hashlib.sha256(json.dumps([manifest["class_names"], indexes]).encode()).hexdigest()


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[Shard, NDArray[Any]]:
    """Writes one tar and its `.idx`, each renamed into place when it is whole.

    Returns the shard and its index rows; their shard number is 0, to be set by the caller.
    """
    rows, lines, labels = [], [], set()
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for sample in samples:
            members = [("jpg", sample.jpeg), ("cls", str(sample.label).encode())]
            if sample.meta:
                members.append(("json", json.dumps(sample.meta, sort_keys=True).encode()))
            fields = []
            for kind, data in members:
                offset = _add(tar, file, f"{sample.key}.{kind}", data)
                fields.append(f"{kind} {offset} {len(data)} {sample.key}.{kind}")
                if kind == "jpg":
                    rows.append((0, offset, len(data), sample.label, zlib.crc32(data)))
            lines.append(" ".join(fields))
            labels.add(sample.label)
    write_atomically(path.with_suffix(".idx"), f"v1.2 {len(lines)}\n" + "\n".join(lines) + "\n")
    shard = Shard(
        name=path.name,
        label=labels.pop() if len(labels) == 1 else None,
        samples=len(rows),
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )
    return shard, np.array(rows, INDEX_DTYPE)


def check_key(key: str) -> None:
    """Raises ValueError for a key that WebDataset or a tar header would not keep as it is."""
    is_text = key.isprintable() and not re.search(r"[./\\\s]", key)
    if not is_text or not 0 < len(key.encode()) <= MAX_KEY:
        raise ValueError(
            f"key {key!r} must be 1 to {MAX_KEY} bytes of text without dots, slashes and spaces"
        )


def _add(tar: tarfile.TarFile, file: BinaryIO, name: str, data: bytes) -> int:
    """Adds one member with a header that depends on name and size alone; returns its offset."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, BytesIO(data))
    return offset


def write_index(
    root: Path, split: str, shards: list[Shard], index: NDArray[Any], classes: int
) -> dict[str, Any]:
    """Writes the index of a split; returns the split as the manifest describes it."""
    content = npy_bytes(index)
    write_atomically(root / f"index-{split}.npy", content)
    return {
        "samples": len(index),
        "counts": np.bincount(index["label"], minlength=classes).tolist(),
        "index": f"index-{split}.npy",
        "index_sha256": hashlib.sha256(content).hexdigest(),
        "shards": [asdict(shard) for shard in shards],
    }


def write_manifest(root: Path, manifest: Manifest) -> Path:
    """Makes the folder, whose tars and indexes are there, a finished set."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
    write_atomically(root / MANIFEST, text + "\n")
    return root / MANIFEST


def copy_name(manifest: bytes) -> str:
    """The folder name of a node's copy of a set: a set that was packed anew has another."""
    return hashlib.sha256(manifest).hexdigest()[:16]
