"""The story of a prediction: a network from a file, image files, the class of each.

Ranks take the images in turn, a part at a time; rank 0 gathers their rows and writes them in order.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dan_dist.data.crops import (
    NO_FACE,
    PackedImages,
    find_images,
    pack_images,
    warn_of_changed,
)
from dan_dist.data.photographs import THRESHOLD, FindFaces, choose_cut, face_finder
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.evaluation.predictions import predict
from dan_dist.inference.outputs import Files, Row, Write, writing
from dan_dist.model.dan import Output, features, probabilities
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import PredictOptions
from shards.command import escape
from shards.detect import load_detector
from shards.files import scratch_folder

# Images at a time: what memory and the temporary folder hold of any number. Photographs may show
# hundreds of faces.
CHUNK, PHOTOGRAPHS = 1024, 64
UNREAD = "unread"
FEW = 64  # images without a progress bar

log = logging.getLogger(__name__)


def main(options: PredictOptions) -> int:
    """Prints each image's class and probabilities; returns how many could not be read, on rank 0.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    files = Files(options.csv, options.parquet, options.features, options.draw)
    if not options.faces and (options.detector or options.face_cut):
        raise ValueError("--detector and --face-cut belong to --faces")
    with session(
        options.device, timeout_s=60.0, on_loss=lambda line: None, stacks=options.checkpoint
    ) as (world, heart):
        world.run_on_all(lambda: files.check() if world.is_main else None)
        trained = world.run_on_all(
            lambda: load_trained(options.checkpoint, options.classes, weights=options.weights)
        )
        find_faces = None
        if options.faces:
            find_faces = world.run_on_all(lambda: open_detector(options, trained))
        elif world.is_main:
            print("each image is taken for the crop of one face", file=sys.stderr)
        paths, names = shared_paths(options.images, world), trained.class_names
        show = print_json(names) if options.json else print_table(names, paths, options.faces)
        bar = tqdm(desc="predicting", total=len(paths), unit="img",
                   disable=len(paths) <= FEW or not world.is_main)  # fmt: skip
        tally = Tally()
        with bar, open_files(files, trained, world, faces=options.faces) as write:

            def predict_part(own: Sequence[Path], start: int) -> list[Row]:
                def progress() -> None:
                    heart.beat("image", int(bar.n))
                    bar.update(min(world.size, len(paths) - bar.n))

                with scratch_folder() as folder:
                    packed = pack_images(
                        own, folder, size=trained.image_size, threads=world.cores,
                        progress=progress, find_faces=find_faces,
                    )  # fmt: skip
                    return predicted(trained, packed, start, world, heart, options.precision)

            def write_part(rows: Sequence[Row]) -> str:
                heart.beat("rows", int(bar.n))
                tally.add(rows)
                write(rows)
                return "on" if shown(show, rows) or any(files) else ""

            count = PHOTOGRAPHS if options.faces else CHUNK
            for rows in in_turn(paths, count, world, predict_part):
                if not world.run_once(partial(write_part, rows)):
                    break  # nobody reads on: `| head`
        heart.finish()
        tally.tell(photographs=len(paths) if world.is_main and options.faces else None)
        for path in filter(None, files if world.is_main else ()):
            log.info("written: %s", path)
        return tally.kinds[UNREAD]


def shared_paths(given: Sequence[Path], world: World) -> list[Path]:
    """The images that are named, as rank 0 finds them, which alone has the standard input."""
    found = world.run_once(lambda: json.dumps([str(path) for path in find_images(given)]))
    return [Path(path) for path in json.loads(found)]


def open_files(
    files: Files, trained: Trained, world: World, *, faces: bool
) -> AbstractContextManager[Write]:
    """Writes rows into files on rank 0; elsewhere, nothing."""
    if not world.is_main:
        return nullcontext(lambda rows: None)
    return writing(files, trained.class_names, trained.network.channels, faces=faces)


def in_turn(
    paths: Sequence[Path], count: int, world: World,
    predict_part: Callable[[Sequence[Path], int], list[Row]],
) -> Iterator[list[Row]]:  # fmt: skip
    """On rank 0 the rows of all images in order; on other ranks as many empty lists.

    Each rank predicts `count` images at a time: they share no step, as a step of training does.
    """
    for first in range(0, len(paths), count * world.size):
        start = first + count * world.rank
        own = paths[start : start + count]
        rows = predict_part(own, start) if own else []
        if world.size == 1:
            yield rows
            continue
        parts: list[Any] | None = [None] * world.size if world.is_main else None
        dist.gather_object(rows, parts)
        yield from parts or [[]] * world.size


class Tally:
    """What became of the images, over all parts and ranks; of other ranks than 0, nothing."""

    def __init__(self) -> None:
        self.kinds = Counter[str]()  # "": predictions; NO_FACE; UNREAD
        self._changed: tuple[int, Path, tuple[int, int]] | None = None  # how many, the first

    def add(self, rows: Sequence[Row]) -> None:
        """Counts further rows, in their order."""
        for row in rows:
            self.kinds[UNREAD if row.is_unread else row.fault] += 1
            if row.changed:
                count, path, size = self._changed or (0, row.path, row.changed)
                self._changed = (count + 1, path, size)

    def tell(self, *, photographs: int | None) -> None:
        """The last lines: of crops that were made square, and of the faces of photographs."""
        if self._changed:
            warn_of_changed(*self._changed)
        if photographs is not None:
            log.info("%d faces in %d photographs; no face found in %d",
                     self.kinds[""], photographs, self.kinds[NO_FACE])  # fmt: skip


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


def predicted(
    trained: Trained, packed: PackedImages, start: int, world: World, heart: Heartbeat,
    precision: Any,
) -> list[Row]:  # fmt: skip
    """The rows of a part of the images, in their order, by this rank alone.

    start: the number of images before the part.
    """
    alone = replace(world, rank=0, size=1, store=None)
    classes = len(trained.class_names)
    nothing = np.full(classes + trained.network.channels, np.nan, np.float32)
    values = np.empty((0, len(nothing)), np.float32)
    if packed.paths:
        values = predict(trained, packed.split, alone, heart, precision, both)
    found = iter(values)
    rows = []
    for own in packed.given:
        row = nothing if own.fault else next(found)
        number = start + own.position + 1
        rows.append(Row(number, own.path, own.face, own.box, own.fault, row[:classes],
                        row[classes:], own.changed))  # fmt: skip
    return rows


def both(output: Output) -> Tensor:
    """(B, classes + C): probabilities and features."""
    return torch.cat([probabilities(output), features(output)], dim=1)


def shown(show: Write, rows: Sequence[Row]) -> bool:
    """Prints rows; False where the reader has ended."""
    try:
        show(rows)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def say(line: str) -> None:
    """Prints a line of the result: above the progress bar where both are on a terminal."""
    if sys.stdout.isatty():
        tqdm.write(line)
    else:  # the bar would be drawn anew for each line, into the log
        print(line)


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
            say(json.dumps(line))

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
            say(heading)
        for row in rows:
            if row.fault:
                say(f"{readable(row.path):{width}}  {place_of(row)}{readable(row.fault)}")
                continue
            values = zip(row.probabilities, names, strict=True)
            cells = "  ".join(f"{value:{max(6, len(n))}.1%}" for value, n in values)
            predicted_class = f"{names[row.probabilities.argmax()]:{classes}}"
            start = f"{readable(row.path):{width}}  {place_of(row)}{predicted_class}"
            say(f"{start}  {cells}")

    return show


def readable(text: object) -> str:
    """A file's name in one line of a terminal, whatever is in it."""
    return escape(str(text))
