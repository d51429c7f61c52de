"""How the faces of a set were cut out of photographs, in manifests, checkpoints and options.

`similarity`: aligned by five landmarks (`releases/similarity.py`). `box:0.1`: cut out by boxes,
widened by a tenth on each side (`releases/boxes.py`). `as_released`: by whoever made the set.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

SIMILARITY, BOX, AS_RELEASED = "similarity", "box", "as_released"
MOST_MARGIN = 2.0  # of a box, in parts of its width and height
NUMBER = r"\d{1,3}(?:\.\d{1,9})?(?:e-\d\d)?"
EXPECTED = f"{SIMILARITY}, {BOX}:MARGIN (as {BOX}:0.1; 0 to {MOST_MARGIN:g}) or {AS_RELEASED}"


class Cut(NamedTuple):
    """A way to cut faces out of photographs."""

    kind: str
    margin: float = 0.0  # of a box, in parts of its width and height, on each side

    def __str__(self) -> str:
        return f"{self.kind}:{self.margin:g}" if self.kind == BOX else self.kind


def parse_cut(text: object) -> Cut:
    """The way that a text names; ValueError: it names none."""
    if text in (SIMILARITY, AS_RELEASED):
        return Cut(str(text))
    found = re.fullmatch(rf"{BOX}:({NUMBER})", str(text))
    if found is None or float(found[1]) > MOST_MARGIN:
        raise ValueError(f"{ascii(text)[:80]}, expected {EXPECTED}")
    return Cut(BOX, float(found[1]))


def cut_of_release(dataset: str, release: str) -> str | None:
    """How faces were cut, of a set whose manifest has only these; None: they do not tell."""
    if boxes := re.search(rf"\bboxes .*\bmargin ({NUMBER})(,|$)", release):
        return str(Cut(BOX, float(boxes[1])))
    if "aligned by landmarks" in release:
        return SIMILARITY
    return None if dataset in ("folder", "identities") else AS_RELEASED


def cut_of_manifest(manifest: Mapping[str, Any]) -> str | None:
    """How the faces were cut; manifests of former versions name the release alone.

    Raises:
        ValueError: it is no cut.
    """
    if "face_cut" not in manifest:
        return cut_of_release(str(manifest["dataset"]), str(manifest["release"]))
    try:
        return str(parse_cut(manifest["face_cut"]))
    except ValueError as error:
        raise ValueError(f"face_cut is {error}") from error
