"""python -m shards.verify DIR: reads every byte of a set of shards and names each fault.

Sizes and checksums of all files, the index against the tars, DALI's `.idx`, labels, metadata, keys,
and every image decoded. Of a set without faults also the images that stand in it more than once,
byte for byte: across splits, within one, under two labels; and, across splits or with --against
across sets, the same photographs in other files: saved anew, resized, cut, mirrored, lighter.
Exit code 0: whole; 1: faults, a line each; 2: no set of shards.
"""

from shards import command

if __name__ == "__main__":  # before numpy is imported: a signal may come meanwhile
    command.verify()

import argparse
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from shards.duplicates import describe_duplicates
from shards.files import read_regular, sha256_of
from shards.format import DRAWN, MANIFEST, Shard, ShardSet, check_key, copy_name, open_shardset
from shards.images import MAX_PIXELS
from shards.index import read_index
from shards.jpeg import plain_jpeg_size
from shards.leaks import Leaks, describe_leaks, find_leaks, of_split, write_leaks
from shards.likeness import Likenesses, jpeg_picture, likenesses
from shards.limits import core_count
from shards.packing.pool import in_processes, worker_count
from shards.releases.source import plain_name

Parts = dict[str, tuple[int, int]]  # of one sample: kind → offset and size in the tar


class Checked(NamedTuple):
    """What is found in one tar."""

    faults: list[str]
    keys: NDArray[np.uint64]  # a hash of each key
    kept: Likenesses  # of each image, where they are compared and there are no faults


NOTHING = Checked([], np.empty(0, np.uint64), likenesses([]))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__)
    parser.add_argument("shards", help="folder with manifest.json")
    parser.add_argument("--workers", type=worker_count, default=0,
                        help="processes (default: all cores)")  # fmt: skip
    parser.add_argument(
        "--against", metavar="DIR", help="a set whose photographs are looked for too"
    )
    parser.add_argument("--leaks", metavar="FOLDER", type=Path,
                        help="for a table of leaked photographs, and a sheet")  # fmt: skip
    options = parser.parse_args(arguments)
    return command.guarded(partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    shards, faults = open_shardset(options.shards), 0
    other = open_shardset(options.against) if options.against else None
    workers, kept = options.workers or core_count(), dict[str, Likenesses]()
    # Drawn faces are alike without being copies
    is_compared = DRAWN not in (shards.dataset, other and other.dataset)
    for fault in verify(shards, workers, kept if is_compared else None):
        faults += 1
        print(plain_name(fault), flush=True)
    repeated = [] if faults else describe_duplicates(shards)
    if is_compared and not faults:
        leaks = _leaks(shards, kept, other, workers)
        repeated += describe_leaks(leaks)
        if options.leaks:
            write_leaks(leaks, options.leaks)
    elif asked := [f"--{name}" for name in ("leaks", "against") if getattr(options, name)]:
        reason = "drawn faces are alike without being copies" if not faults else "there are faults"
        print(f"{' and '.join(asked)}: no photographs were compared, as {reason}")
    samples = sum(sum(counts) for counts in shards.counts.values())
    for line in repeated:
        print(plain_name(line))
    state = "each whole; duplicates and leaks stand above" if repeated else "all as they should be"
    whole = f"{plain_name(str(shards.root))}: {samples} images, {state}"
    print(f"{faults} faults" if faults else whole)
    return command.FAILED if faults else 0


def _leaks(
    shards: ShardSet, kept: Mapping[str, Likenesses], other: ShardSet | None, workers: int
) -> list[Leaks]:
    own = [(shards.split(name), pictures) for name, pictures in kept.items()]
    others = None if other is None else [
        (replace(split, name=f"{other.root}/{split.name}"), of_split(split, workers))
        for split in map(other.split, other.splits)
    ]  # fmt: skip
    return find_leaks(own, others, workers)


def verify(
    shards: ShardSet, workers: int, kept: dict[str, Likenesses] | None = None
) -> Iterator[str]:
    """Yields each fault as a line that begins with the file's name.

    kept: receives what `likeness` keeps of each split's images, in the order of the index, as they
    are decoded once. Of a set with faults it may be anything.
    """
    expected = {"manifest.json", "contact_sheet.png", *shards.index_names.values()}
    for split in shards.splits:
        yield from _verify_split(shards, split, workers, kept)
        for shard in shards.shards[split]:
            expected |= {shard.name, Path(shard.name).with_suffix(".idx").name}
    for path in sorted(shards.root.iterdir()):
        if path.name not in expected and not re.fullmatch(r"packing[-\w]*\.lock", path.name):
            yield f"{path.name}: not part of the set"


def _verify_split(
    shards: ShardSet, split: str, workers: int, kept: dict[str, Likenesses] | None
) -> Iterator[str]:
    name, own = shards.index_names[split], shards.shards[split]
    path, classes = shards.root / name, len(shards.class_names)
    try:
        sizes = [shard.size_bytes for shard in own]
        index, sha256 = read_index(path, sizes, sum(shards.counts[split]), classes)
    except (ValueError, OSError) as error:
        yield f"{name}: {error}; its shards were not checked"
        return
    if sha256 != shards.index_sha256[split]:
        yield f"{name}: its sha256 differs from the manifest's"
    counts = np.bincount(index["label"], minlength=classes).tolist()
    if counts != list(shards.counts[split]):
        yield f"{name}: {counts} samples by class, the manifest lists {list(shards.counts[split])}"
    # A node's cached copy, which training alone reads, is made without `.idx`.
    is_copy = shards.root.resolve().name == copy_name((shards.root / MANIFEST).read_bytes())
    tasks = (
        (
            shards.root / shard.name,
            shard,
            index[index["shard"] == number],
            shards.image_size,
            is_copy,
            kept is not None,
        )
        for number, shard in enumerate(own)
    )
    found: dict[int, Checked] = {}
    bar = tqdm(desc=f"verifying {split}", total=len(index), unit="img", disable=None)
    with bar, in_processes(_verify_shard, tasks, min(workers, len(own))) as finished:
        for number, found[number] in finished:
            yield from found[number].faults
            bar.update(own[number].samples)
    checked = [found[number] for number in sorted(found)]
    together = np.concatenate([NOTHING.keys, *(shard.keys for shard in checked)])
    if (twice := len(together) - len(np.unique(together))) > 0:
        yield f"{split}: {twice} keys stand there twice"
    if kept is not None:
        kept[split] = np.concatenate([NOTHING.kept, *(shard.kept for shard in checked)])


def _verify_shard(
    path: Path, shard: Shard, rows: NDArray[np.void], image_size: int | None, is_copy: bool,
    is_compared: bool,
) -> Checked:  # fmt: skip
    if not path.is_file():
        return NOTHING._replace(faults=[f"{shard.name}: missing"])
    if (size := path.stat().st_size) != shard.size_bytes:
        fault = f"{shard.name}: {size} bytes, the manifest lists {shard.size_bytes}"
        return NOTHING._replace(faults=[fault])
    faults = []
    if sha256_of(path) != shard.sha256:
        faults.append(f"{shard.name}: its sha256 differs from the manifest's")
    try:
        samples, odd = _members(path)
    except Exception as error:  # tarfile raises errors of many kinds on damaged headers
        return NOTHING._replace(faults=[*faults, f"{shard.name}: no readable tar: {error}"])
    faults += [f"{shard.name}: {fault}" for fault in odd]
    if len(samples) != len(rows) or len(rows) != shard.samples:
        faults.append(
            f"{shard.name}: {len(samples)} samples, the index has {len(rows)} and the manifest "
            f"{shard.samples}"
        )
    data, pictures = path.read_bytes(), list[Image.Image]()
    for (key, parts), row in zip(samples.items(), rows, strict=False):
        faults += [
            f"{shard.name}: {key}: {fault}"
            for fault in _sample(data, parts, row, shard, image_size, pictures)
        ]
    if not is_copy or path.with_suffix(".idx").exists():
        faults += _verify_idx(path.with_suffix(".idx"), samples)
    raw = (key.encode(errors="surrogateescape") for key in samples)
    digests = [hashlib.blake2b(key, digest_size=8).digest() for key in raw]
    keys = np.frombuffer(b"".join(digests), np.uint64)
    return Checked(faults, keys, likenesses(pictures if is_compared else []))


def _members(path: Path) -> tuple[dict[str, Parts], list[str]]:
    """The samples of a tar by key, and the faults of its members."""
    samples: dict[str, Parts] = {}
    faults = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.size < 0:  # the next header would be one that was read before
                raise tarfile.ReadError(f"{member.name!r} has a size of {member.size}")
            if not member.isfile():
                faults.append(f"{member.name!r} is no file")
                continue
            key, _, kind = member.name.partition(".")
            samples.setdefault(key, {})[kind] = member.offset_data, member.size
    for key in samples:
        try:
            check_key(key)
        except ValueError as error:
            faults.append(str(error))
    return samples, faults


def _sample(
    data: bytes, parts: Parts, row: np.void, shard: Shard, size: int | None,
    pictures: list[Image.Image],
) -> Iterator[str]:  # fmt: skip
    """The faults of a sample; its picture is added to `pictures`."""

    def content(kind: str) -> bytes:
        offset, length = parts[kind]
        return data[offset : offset + length]

    if missing := {"jpg", "cls"} - parts.keys():
        yield f"no .{min(missing)}"
        return
    if parts["jpg"] != (row["offset"], row["size"]):
        yield f"its image stands at {parts['jpg']}, the index has {row['offset'], row['size']}"
    jpeg = content("jpg")
    if zlib.crc32(jpeg) != row["crc32"]:
        yield "its image's checksum differs from the index"
    label = content("cls")
    if label != str(row["label"]).encode() or shard.label not in (None, row["label"]):
        yield f"label {label.decode(errors='replace')}, the index has {row['label']} and the " + (
            f"manifest {shard.label}"
        )
    if "json" in parts:
        try:
            json.loads(content("json"))
        except (ValueError, RecursionError) as error:
            yield f"its metadata are no JSON: {error}"
    pixels = plain_jpeg_size(jpeg)
    if pixels and pixels[0] * pixels[1] > MAX_PIXELS:
        yield f"its image has {pixels} pixels, at most {MAX_PIXELS} are read"
        return
    try:
        pictures.append(jpeg_picture(jpeg))
    except ValueError as error:
        yield f"its image cannot be decoded: {error}"
        return
    if pixels is None:
        yield "its image is no plain JPEG"
    elif size is not None and pixels != (size, size):
        yield f"its image has {pixels} pixels, the manifest has {size}×{size}"


def _verify_idx(path: Path, samples: dict[str, Parts]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name}: missing"
        return
    expected = [f"v1.2 {len(samples)}"] + [
        " ".join(f"{kind} {at} {size} {key}.{kind}" for kind, (at, size) in parts.items())
        for key, parts in samples.items()
    ]
    longest = 2 * sum(len(line.encode(errors="replace")) + 1 for line in expected)
    try:
        data = read_regular(path, longest, cut=True)
    except (OSError, ValueError) as error:
        yield f"{path.name}: {command.words(error)}"
        return
    if data.decode(errors="replace").splitlines() != expected:
        yield f"{path.name}: differs from its tar"
