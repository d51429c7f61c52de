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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.duplicates import describe_duplicates
from shards.files import read_regular, sha256_of
from shards.format import MANIFEST, Shard, ShardSet, check_key, copy_name, open_shardset
from shards.images import MAX_PIXELS
from shards.index import read_index
from shards.jpeg import jpeg_fault, plain_jpeg_size
from shards.leaks import describe_leaks, find_leaks, write_leaks
from shards.limits import core_count
from shards.packing.pool import in_processes
from shards.releases.source import plain_name

Parts = dict[str, tuple[int, int]]  # of one sample: kind → offset and size in the tar


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__)
    parser.add_argument("shards", help="folder with manifest.json")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: all cores)")
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
    workers = options.workers or core_count()
    for fault in verify(shards, workers):
        faults += 1
        print(plain_name(fault), flush=True)
    repeated = [] if faults else describe_duplicates(shards)
    if not faults:
        leaks = find_leaks(shards, workers, other)
        repeated += describe_leaks(leaks)
        if options.leaks:
            write_leaks(leaks, options.leaks)
    samples = sum(sum(counts) for counts in shards.counts.values())
    for line in repeated:
        print(plain_name(line))
    state = "each whole; duplicates and leaks stand above" if repeated else "all as they should be"
    whole = f"{plain_name(str(shards.root))}: {samples} images, {state}"
    print(f"{faults} faults" if faults else whole)
    return command.FAILED if faults else 0


def verify(shards: ShardSet, workers: int) -> Iterator[str]:
    """Yields each fault as a line that begins with the file's name."""
    expected = {"manifest.json", "contact_sheet.png", *shards.index_names.values()}
    for split in shards.splits:
        yield from _verify_split(shards, split, workers)
        for shard in shards.shards[split]:
            expected |= {shard.name, Path(shard.name).with_suffix(".idx").name}
    for path in sorted(shards.root.iterdir()):
        if path.name not in expected and not re.fullmatch(r"packing[-\w]*\.lock", path.name):
            yield f"{path.name}: not part of the set"


def _verify_split(shards: ShardSet, split: str, workers: int) -> Iterator[str]:
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
        )
        for number, shard in enumerate(own)
    )
    keys: list[NDArray[np.uint64]] = []
    bar = tqdm(desc=f"verifying {split}", total=len(index), unit="img", disable=None)
    with bar, in_processes(_verify_shard, tasks, min(workers, len(own))) as finished:
        for number, (faults, hashes) in finished:
            yield from faults
            keys.append(hashes)
            bar.update(own[number].samples)
    together = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    if (twice := len(together) - len(np.unique(together))) > 0:
        yield f"{split}: {twice} keys stand there twice"


def _verify_shard(
    path: Path, shard: Shard, rows: NDArray[np.void], image_size: int | None, is_copy: bool
) -> tuple[list[str], NDArray[np.uint64]]:
    """The faults of one tar, and a hash of each key."""
    nothing = np.empty(0, np.uint64)
    if not path.is_file():
        return [f"{shard.name}: missing"], nothing
    if (size := path.stat().st_size) != shard.size_bytes:
        return [f"{shard.name}: {size} bytes, the manifest lists {shard.size_bytes}"], nothing
    faults = []
    if sha256_of(path) != shard.sha256:
        faults.append(f"{shard.name}: its sha256 differs from the manifest's")
    try:
        samples, odd = _members(path)
    except Exception as error:  # tarfile raises errors of many kinds on damaged headers
        return [*faults, f"{shard.name}: no readable tar: {error}"], nothing
    faults += [f"{shard.name}: {fault}" for fault in odd]
    if len(samples) != len(rows) or len(rows) != shard.samples:
        faults.append(
            f"{shard.name}: {len(samples)} samples, the index has {len(rows)} and the manifest "
            f"{shard.samples}"
        )
    data = path.read_bytes()
    for (key, parts), row in zip(samples.items(), rows, strict=False):
        faults += [
            f"{shard.name}: {key}: {fault}"
            for fault in _sample(data, parts, row, shard, image_size)
        ]
    if not is_copy or path.with_suffix(".idx").exists():
        faults += _verify_idx(path.with_suffix(".idx"), samples)
    raw = (key.encode(errors="surrogateescape") for key in samples)
    digests = [hashlib.blake2b(key, digest_size=8).digest() for key in raw]
    return faults, np.frombuffer(b"".join(digests), np.uint64)


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
    data: bytes, parts: Parts, row: np.void, shard: Shard, size: int | None
) -> Iterator[str]:
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
        except ValueError as error:
            yield f"its metadata are no JSON: {error}"
    pixels = plain_jpeg_size(jpeg)
    if pixels and pixels[0] * pixels[1] > MAX_PIXELS:
        yield f"its image has {pixels} pixels, at most {MAX_PIXELS} are read"
    elif fault := jpeg_fault(jpeg):
        yield f"its image cannot be decoded: {fault}"
    elif pixels is None:
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
