"""Faces of photographs, found by a detector and cut out as those were that training saw."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shards.cut import AS_RELEASED, EXPECTED, SIMILARITY, Cut, parse_cut
from shards.detect import Detector, Face
from shards.format import open_shardset
from shards.releases.boxes import Box, crop_box
from shards.releases.similarity import align

THRESHOLD = 0.6  # the least score of a face, 0 to 1


class CutFace(NamedTuple):
    """A face of a photograph."""

    box: Box  # left, top, width, height in pixels of the upright photograph
    image: Image.Image | None
    fault: str = ""  # why it cannot be cut out


FindFaces = Callable[[Image.Image], list[CutFace]]


def face_finder(detect: Detector, cut: Cut, size: int) -> FindFaces:
    """What gives the faces of an RGB photograph, from left to right; aligned ones of `size`."""

    def find(photograph: Image.Image) -> list[CutFace]:
        return [_cut_out(photograph, face, cut, size) for face in detect(photograph)]

    return find


def _cut_out(photograph: Image.Image, face: Face, cut: Cut, size: int) -> CutFace:
    left, top, width, height = (round(edge) for edge in face.box)
    box = (left, top, width, height)
    try:
        if cut.kind == SIMILARITY:
            return CutFace(box, align(photograph, face.landmarks, size))
        return CutFace(box, crop_box(photograph, box, cut.margin)[0])
    except ValueError as error:
        return CutFace(box, None, str(error))


def choose_cut(path: Path, known: str | None, wanted: str | None) -> Cut:
    """How to cut faces for a network: as in its training, or as an option has it.

    path: of the network's file, for errors; known: how its training's faces were cut, if it is
    known; wanted: the option --face-cut.

    Raises:
        ValueError: the option names no way, or is missing where training's way cannot be repeated.
    """
    if wanted is not None:
        try:
            cut = parse_cut(wanted)
        except ValueError as error:
            raise ValueError(f"--face-cut {error}") from error
        if cut.kind == AS_RELEASED:
            raise ValueError(f"--face-cut {wanted}: no way to cut a photograph's faces")
        return cut
    if known in (None, AS_RELEASED):
        reason = {
            None: "does not tell how its training's faces were cut",
            AS_RELEASED: "was trained on faces that the set's makers have cut",
        }[known]
        expected = EXPECTED.rpartition(" or ")[0]
        raise ValueError(f"{path} {reason}: give --face-cut {expected}")
    return parse_cut(known)


def cut_of_shards(folder: str, fingerprint: str) -> str | None:
    """How the faces of a set were cut that still lies where a training has read it."""
    try:
        found = open_shardset(folder)
    except (OSError, ValueError):
        return None
    return found.face_cut if found.fingerprint == fingerprint else None
