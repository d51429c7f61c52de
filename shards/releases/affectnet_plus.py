"""AffectNet+ (Fard et al. 2024, arXiv 2410.22506): crops of 224 px, each with a JSON.

The JSON, in `annotations/` or beside the image, has the label that a person gave (`Human-Label`),
the share of each class (`Soft-Label`), how hard the image is (`Subset`) and more (`Metadata`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.release import Content, Item, LeftOut, check_soft
from shards.releases.affectnet_crops import images_by_stem
from shards.releases.affectnet_labels import CLASSES, check_label, is_class
from shards.releases.layout import part
from shards.releases.source import Keys, Source, entries, read_file


def list_plus(
    homes: Mapping[str, Path], source: Source, classes: int, left_out: LeftOut
) -> dict[str, list[Item]]:
    """Items whose source is the image and its JSON."""
    splits: dict[str, list[Item]] = {}
    for split, home in homes.items():
        folders = [part(home, name, source) or home for name in ("images", "annotations")]
        images = images_by_stem(source, folders[0], left_out)
        notes = {Path(entry.name).stem: entry.name
                 for entry in entries(folders[1], source, left_out)
                 if entry.name.lower().endswith(".json")}  # fmt: skip
        for stem in sorted(images.keys() - notes.keys()):
            left_out.add("no annotation", folders[0] / images[stem])
        for stem in sorted(notes.keys() - images.keys()):
            left_out.add("annotated, but there is no image", folders[0] / stem)
        keys, splits[split] = Keys(), []
        for stem in sorted(images.keys() & notes.keys()):
            note = source.relative(folders[1] / notes[stem])
            label = check_label(_note(source, note).get("Human-Label"), str(source.root / note))
            if is_class(label, classes, left_out):
                place = source.relative(folders[0] / images[stem]), note
                splits[split].append(Item(keys.make(stem), label, place))
    return splits


def _note(source: Source, relative: str) -> dict[str, Any]:
    def refuse(number: str) -> None:  # which no JSON of ours may hold
        raise ValueError(f"it holds {number}")

    try:
        note = json.loads(read_file(source, relative), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{relative}: no JSON: {error}") from error
    if not isinstance(note, dict):
        raise ValueError(f"{relative}: {str(note)[:80]}, expected an annotation")
    return note


def read_plus(item: Item, source: Source, classes: int) -> Content:
    """The crop's bytes, with human label, soft label, subset and metadata of its JSON."""
    image, relative = item.source
    note = _note(source, relative)
    soft = note.get("Soft-Label")
    if not isinstance(soft, list) or len(soft) != len(CLASSES):
        raise ValueError(
            f"{relative}: Soft-Label {str(soft)[:80]}, expected {len(CLASSES)} numbers"
        )
    shares = check_soft(soft[:classes], f"{relative}: Soft-Label")
    meta = {
        "human_label": CLASSES[item.label],
        "soft_label": dict(zip(CLASSES, soft, strict=True)),
        "subset": note.get("Subset"),
        "metadata": note.get("Metadata"),
    }
    return Content(read_file(source, image), meta, shares)
