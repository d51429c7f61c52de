"""The story of a prediction: a network from a file, image files, the class of each."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dan_dist.data.crops import NO_FACE, PackedImages, find_images, pack_images
from dan_dist.data.photographs import THRESHOLD, FindFaces, choose_cut, face_finder
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.evaluation.predictions import predict
from dan_dist.inference.outputs import FEATURES, Files, Row, Write, writing
from dan_dist.model.dan import Output, features, probabilities
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import PredictOptions
from shards.command import escape
from shards.detect import load_detector
from shards.files import scratch_folder

# Images at a time: what memory and the temporary folder hold of any number. Photographs may show
# hundreds of faces.
CHUNK, PHOTOGRAPHS = 1024, 256
UNREAD = "unread"
FEW = 64  # images without a progress bar

log = logging.getLogger(__name__)


def main(options: PredictOptions) -> int:
    """Prints each image's class and probabilities; returns how many could not be read.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    files = Files(options.csv, options.parquet, options.features, options.draw)
    files.check()
    if not options.faces:
        if options.detector or options.face_cut:
            raise ValueError("--detector and --face-cut belong to --faces")
        print("each image is taken for the crop of one face", file=sys.stderr)
    with session(options.device, timeout_s=60.0, on_loss=lambda line: None) as (world, heart):
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: predict runs as one; evaluate runs on many")
        trained = load_trained(options.checkpoint, options.classes, weights=options.weights)
        find_faces = open_detector(options, trained) if options.faces else None
        names, paths, found = trained.class_names, find_images(options.images), Counter[str]()
        show = print_json(names) if options.json else print_table(names, paths, options.faces)
        with (
            tqdm(desc="predicting", total=len(paths), unit="img", disable=len(paths) <= FEW) as bar,
            writing(files, names, faces=options.faces) as write,
        ):

            def pack(own: Sequence[Path], folder: Path) -> PackedImages:
                return pack_images(
                    own, folder, size=trained.image_size, threads=world.cores,
                    progress=bar.update, find_faces=find_faces,
                )  # fmt: skip

            parts = packed_parts(paths, PHOTOGRAPHS if options.faces else CHUNK, pack)
            for rows in predicted(trained, parts, world, heart, options.precision):
                found.update(kind_of(row) for row in rows)
                write(rows)
                if not shown(show, rows) and not any(files):
                    break  # nobody reads on: `| head`
        if options.faces:
            log.info("%d faces in %d photographs; no face found in %d",
                     found[""], len(paths), found[NO_FACE])  # fmt: skip
        for path in filter(None, files):
            log.info("written: %s", path)
        return found[UNREAD]


def kind_of(row: Row) -> str:
    """ "": a prediction; NO_FACE; UNREAD."""
    return UNREAD if row.is_unread else row.fault


def open_detector(options: PredictOptions, trained: Trained) -> FindFaces:
    """What finds a photograph's faces and cuts them out as the network's training saw faces.

    Raises:
        ValueError, OSError: training's way is unknown or cannot be repeated and no other is given;
            the detector cannot be loaded.
    """
    known = trained.face_cut if options.face_cut is None else None
    cut = choose_cut(trained.path, known, options.face_cut)
    detect = load_detector(options.detector, THRESHOLD, option="--detector")
    log.info("faces are found by %s and cut out as %s", options.detector or "YuNet", cut)
    return face_finder(detect, cut, trained.image_size)


def packed_parts(
    paths: Sequence[Path], count: int, pack: Callable[[Sequence[Path], Path], PackedImages]
) -> Iterator[tuple[int, PackedImages]]:
    """The images, packed `count` at a time into a folder of their own, and where they start."""
    for start in range(0, len(paths), count):
        with scratch_folder() as folder:
            yield start, pack(paths[start : start + count], folder)


def predicted(
    trained: Trained, parts: Iterable[tuple[int, PackedImages]], world: World, heart: Heartbeat,
    precision: Any,
) -> Iterator[list[Row]]:  # fmt: skip
    """The rows of all images, a part at a time, in their order."""
    nothing = np.full(len(trained.class_names) + FEATURES, np.nan, np.float32)
    for start, packed in parts:
        values = np.empty((0, len(nothing)), np.float32)
        if packed.paths:
            values = predict(trained, packed.split, world, heart, precision, both)
        found = iter(values)
        yield [
            Row(
                start + own.position + 1, own.path, own.face, own.box, own.fault,
                *split_row(nothing if own.fault else next(found)),
            )
            for own in packed.given
        ]  # fmt: skip


def both(output: Output) -> Tensor:
    """(B, classes + 512): probabilities and features."""
    return torch.cat([probabilities(output), features(output)], dim=1)


def split_row(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two parts of a row of `both`."""
    return values[:-FEATURES], values[-FEATURES:]


def shown(show: Write, rows: Sequence[Row]) -> bool:
    """Prints rows; False where the reader has ended."""
    try:
        show(rows)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def print_json(names: tuple[str, ...]) -> Write:
    """Prints a line of JSON a row: image, face and box, class, probabilities, or an error."""

    def show(rows: Sequence[Row]) -> None:
        for row in rows:
            line: dict[str, Any] = {"image": str(row.path)}
            if row.face is not None:
                line |= {"face": row.face, "box": row.box}
            if row.fault:
                line["error"] = row.fault
            else:
                line["class"] = names[row.probabilities.argmax()]
                values = row.probabilities.tolist()
                line["probabilities"] = dict(zip(names, values, strict=True))
            tqdm.write(json.dumps(line))

    return show


def print_table(names: tuple[str, ...], paths: Sequence[Path], faces: bool) -> Write:
    """Prints a row for each: its name and class, the probabilities in per cent, or an error.

    faces: of photographs, whose number and box (left, top, width, height) follow the name.
    """
    width = max(len("image"), *(len(readable(path)) for path in paths))
    classes = max(map(len, ["class", *names]))
    place = f"{'face':>4}  {'box':19}  " if faces else ""
    columns = "  ".join(f"{n:>6}" for n in names)
    heading = f"{'image':{width}}  {place}{'class':{classes}}  {columns}"

    def place_of(row: Row) -> str:
        if not faces:
            return ""
        box = " ".join(f"{edge:4}" for edge in row.box or ())
        return f"{row.face or '':>4}  {box:19}  "

    def show(rows: Sequence[Row]) -> None:
        if rows and rows[0].number == 1:
            tqdm.write(heading)
        for row in rows:
            if row.fault:
                tqdm.write(f"{readable(row.path):{width}}  {place_of(row)}{readable(row.fault)}")
                continue
            values = zip(row.probabilities, names, strict=True)
            cells = "  ".join(f"{value:{max(6, len(n))}.1%}" for value, n in values)
            predicted_class = f"{names[row.probabilities.argmax()]:{classes}}"
            start = f"{readable(row.path):{width}}  {place_of(row)}{predicted_class}"
            tqdm.write(f"{start}  {cells}")

    return show


def readable(text: object) -> str:
    """A file's name in one line of a terminal, whatever is in it."""
    return escape(str(text))
