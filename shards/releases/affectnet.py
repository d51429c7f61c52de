"""AffectNet, its releases: recognised by their layout, labels dropped by rule, counts compared.

Reduced (March 2021): `train_set/{images,annotations}`, `val_set/…`: affectnet_crops.py.
Full: `Manually_Annotated_Images/`, `training.csv`, `validation.csv`: affectnet_photos.py.
AffectNet+ (2024): crops with a JSON each: affectnet_plus.py.
Each part is found by itself, however the archives were unpacked.
"""

import logging
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from shards.cut import AS_RELEASED, BOX, Cut
from shards.release import Item, LeftOut, Read, Release
from shards.releases.affectnet_crops import list_crops
from shards.releases.affectnet_labels import CLASSES
from shards.releases.affectnet_photos import COLUMNS, list_photos, read_photo
from shards.releases.affectnet_plus import list_plus, read_plus
from shards.releases.layout import Found, contents, find_parts, inner, only, part, visible
from shards.releases.source import Source, check_counts, open_source

__all__ = ["CLASSES", "COLUMNS", "OFFICIAL", "TRAIN", "release"]

Kind = Literal["reduced", "full", "AffectNet+"]

TRAIN = (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750)
OFFICIAL: dict[str, dict[str, tuple[int, ...]]] = {
    "reduced": {"train": TRAIN, "val": (*[500] * 7, 499)},
    "full": {"train": TRAIN, "val": (500,) * 8},
}
PHOTOS = "Manually_Annotated_Images"
TRAIN_FOLDERS = ("train_set", "train")  # AffectNet+ comes with either
VAL_FOLDERS = ("val_set", "valid_set", "validation_set", "val", "valid", "validation")
LISTS = {"train": "training.csv", "val": "validation.csv"}
AUTOMATIC = ("automatically_annotated_images", "automatically_annotated.csv")

log = logging.getLogger(__name__)


def release(
    source: str | Path | Source, *, classes: int = 8, size: int | None, margin: float
) -> Release:
    """The images of any of the releases, as 7 classes (without contempt) or 8.

    size: pixels of the packed images, into which landmarks are converted; None keeps sizes.
    margin: of the full release's face boxes, in parts of their width and height, on each side.

    Raises:
        FileNotFoundError: a part of a release is missing. ValueError: two releases, or the part
            whose labels nobody has looked at.
    """
    source = open_source(source)
    patterns = (*TRAIN_FOLDERS, *VAL_FOLDERS, *LISTS.values(), PHOTOS.lower(), *AUTOMATIC)
    found = find_parts(source, patterns)
    kind, left_out = _kind(source, found), LeftOut(source.root)
    log.info("%s: AffectNet, %s", source.root,
             kind if kind == "AffectNet+" else f"the {kind} release")  # fmt: skip
    if kind != "full" and margin:
        raise ValueError("--margin: only the full release's images are not crops already")
    if kind == "full":
        splits, read = _full(source, found, classes, left_out, size=size, margin=margin)
    elif kind == "reduced":
        splits, read = list_crops(_homes(source, found), source, classes, left_out, size=size)
    else:
        splits = list_plus(_homes(source, found), source, classes, left_out)
        read = partial(read_plus, source=source.absolute(), classes=classes)
    if kind in OFFICIAL:
        official = {split: counts[:classes] for split, counts in OFFICIAL[kind].items()}
        check_counts(f"AffectNet's {kind} release", CLASSES[:classes], splits, official)
    described = {
        "reduced": "reduced release", "full": f"full release, boxes with margin {margin:g}",
        "AffectNet+": "AffectNet+, human labels",
    }[kind]  # fmt: skip
    face_cut = str(Cut(BOX, margin)) if kind == "full" else AS_RELEASED
    return Release(
        f"AffectNet-{classes}", described, CLASSES[:classes], splits, read, left_out,
        face_cut=face_cut,
    )  # fmt: skip


def _kind(source: Source, found: Found) -> Kind:
    """Which release the parts are of."""
    homes = [inner(home, source) for name in TRAIN_FOLDERS for home in found[name]]
    notes = {home: part(home, "annotations", source) for home in homes if home.is_dir()}
    is_plus = any(_holds_json(own, source) for pair in notes.items() for own in pair if own)
    is_reduced = any(notes.get(inner(home, source)) for home in found["train_set"])
    is_automatic = any(found[name] for name in AUTOMATIC)
    if (is_reduced or is_plus) and found["training.csv"]:
        raise ValueError(
            f"{source.root} holds both AffectNet releases (train_set/ and training.csv)"
        )
    if is_plus:
        return "AffectNet+"
    if is_reduced:
        return "reduced"
    if not found["training.csv"] and is_automatic:
        raise ValueError(
            f"{source.root} holds AffectNet's automatically annotated part, which is not packed: "
            f"nobody has looked at its labels; pack training.csv, validation.csv and {PHOTOS}/"
        )
    if not found["training.csv"]:
        raise FileNotFoundError(
            f"{source.root} holds no AffectNet release: neither train_set/annotations/ (the "
            f"reduced one, AffectNet+) nor training.csv with {PHOTOS}/ (the full one) is there; "
            f"{contents(source)}"
        )
    if is_automatic:
        log.warning("%s: the automatically annotated part is passed over", source.root)
    return "full"


def _holds_json(folder: Path, source: Source) -> bool:
    """Whether JSON is among a folder's first files: of a million, all need not be looked at."""
    if not folder.is_dir() or not source.holds(folder):
        return False
    return any(entry.name.lower().endswith(".json") for entry in islice(visible(folder), 100))


def _homes(source: Source, found: Found) -> dict[str, Path]:
    """The folder of each split, of crops."""
    homes = {}
    for split, names in (("train", TRAIN_FOLDERS), ("val", VAL_FOLDERS)):
        own = next((found[name] for name in names if found[name]), [])
        home = only(own, source)
        if home is None:
            raise FileNotFoundError(f"{source.root / names[0]} not found; {contents(source)}")
        homes[split] = home
    return homes


def _full(
    source: Source, found: Found, classes: int, left_out: LeftOut, *, size: int | None,
    margin: float,
) -> tuple[dict[str, list[Item]], Read]:  # fmt: skip
    training = only(found["training.csv"], source)
    assert training is not None  # by which the release was known
    validation = only(found["validation.csv"], source)
    if validation is None:
        raise FileNotFoundError(f"{training.parent / 'validation.csv'} not found")
    photos = only(found[PHOTOS.lower()], source)
    if photos is None:
        place = source.root / PHOTOS
        raise FileNotFoundError(f"{place} not found; unpack the full release's images there")
    lists = {"train": training, "val": validation}
    splits, columns = list_photos(lists, photos, source, classes, left_out)
    read = partial(read_photo, source=source.absolute(), lists=columns, size=size, margin=margin,
                   photos=source.relative(photos))  # fmt: skip
    return splits, read
