"""Small folder data sets and their packs."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from shards.format import MANIFEST
from shards.packing.claim import CONTACT_SHEET
from shards.packing.writer import pack
from shards.releases import folder

CLASSES = ("angry", "happy")  # of `tree`


def picture(seed: int, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)  # smooth: JPEG is close
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tree(root: Path, *, train: int = 9, val: int = 3) -> Path:
    """A folder data set of plain 24 px JPEGs."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            path = root / split / name
            path.mkdir(parents=True)
            for k in range(count):
                jpeg = encoded(picture(1000 * label + 10 * k + (split == "val")), "JPEG")
                (path / f"{k}.jpg").write_bytes(jpeg)
    return root


def packed(source: Path, out: Path, **options: object) -> Path:
    """`out`, into which the folder data set `source` is packed, four images a shard."""
    pack(folder.release(source), out, **({"size": 24, "workers": 1, "shard_size": 4} | options))
    return out


def digests(root: Path) -> dict[str, str]:
    """The checksums of a set's files."""
    files = [p for p in root.iterdir() if p.name != CONTACT_SHEET and p.suffix != ".lock"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit_manifest(root: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def replace_index(root: Path, index: np.ndarray, split: str = "train") -> None:
    """Writes another index as if the set had been packed with it."""
    path = root / f"index-{split}.npy"
    np.save(path, index)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(root, lambda m: m["splits"][split].update(index_sha256=sha256))
