"""The story of a prediction: a network from a file, image files, the class of each."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dan_dist.data.crops import find_images, pack_images
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.evaluation.predictions import predict
from dan_dist.inference.outputs import FEATURES, Files, Row, Write, writing
from dan_dist.model.dan import Output, features, probabilities
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import PredictOptions
from shards.command import escape
from shards.files import scratch_folder

CHUNK = 1024  # images at a time: what memory and the temporary folder hold of any number
FEW = 64  # images without a progress bar

log = logging.getLogger(__name__)


def main(options: PredictOptions) -> int:
    """Prints each image's class and probabilities; returns how many could not be read.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    print("each image is taken for the crop of one face", file=sys.stderr)
    files = Files(options.csv, options.parquet, options.features, options.draw)
    files.check()
    with session(options.device, timeout_s=60.0, on_loss=lambda line: None) as (world, heart):
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: predict runs as one; evaluate runs on many")
        trained = load_trained(options.checkpoint, options.classes, weights=options.weights)
        names, paths, faults = trained.class_names, find_images(options.images), 0
        show = print_json(names) if options.json else print_table(names, paths)
        with (
            tqdm(desc="predicting", total=len(paths), unit="img", disable=len(paths) <= FEW) as bar,
            writing(files, names, len(paths)) as write,
        ):
            for rows in predicted(trained, paths, world, heart, options.precision, bar.update):
                faults += sum(bool(row.fault) for row in rows)
                write(rows)
                if not shown(show, rows) and not any(files):
                    break  # nobody reads on: `| head`
        for path in filter(None, files):
            log.info("written: %s", path)
        return faults


def predicted(
    trained: Trained, paths: Sequence[Path], world: World, heart: Heartbeat, precision: Any,
    progress: Callable[[], object],
) -> Iterator[list[Row]]:  # fmt: skip
    """The rows of all images, some at a time, in their order."""
    for start in range(0, len(paths), CHUNK):
        with scratch_folder() as folder:
            packed = pack_images(
                paths[start : start + CHUNK], folder, size=trained.image_size,
                threads=world.cores, progress=progress,
            )  # fmt: skip
            values = np.empty((0, len(trained.class_names) + FEATURES), np.float32)
            if packed.paths:
                values = predict(trained, packed.split, world, heart, precision, both)
        found = iter(values)
        nothing = np.full(len(trained.class_names) + FEATURES, np.nan, np.float32)
        yield [
            Row(number, path, fault, *split_row(nothing if fault else next(found)))
            for number, (path, fault) in enumerate(packed.given, start=start + 1)
        ]


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
    """Prints a line of JSON an image: its name and class, the probabilities, or an error."""

    def show(rows: Sequence[Row]) -> None:
        for row in rows:
            line: dict[str, Any] = {"image": str(row.path)}
            if row.fault:
                line["error"] = row.fault
            else:
                line["class"] = names[row.probabilities.argmax()]
                values = row.probabilities.tolist()
                line["probabilities"] = dict(zip(names, values, strict=True))
            tqdm.write(json.dumps(line))

    return show


def print_table(names: tuple[str, ...], paths: Sequence[Path]) -> Write:
    """Prints a row an image: its name and class, the probabilities in per cent, or an error."""
    width = max(len("image"), *(len(readable(path)) for path in paths))
    classes = max(map(len, ["class", *names]))
    heading = f"{'image':{width}}  {'class':{classes}}  " + "  ".join(f"{n:>6}" for n in names)

    def show(rows: Sequence[Row]) -> None:
        if rows and rows[0].number == 1:
            tqdm.write(heading)
        for row in rows:
            if row.fault:
                tqdm.write(f"{readable(row.path):{width}}  {readable(row.fault)}")
                continue
            values = zip(row.probabilities, names, strict=True)
            cells = "  ".join(f"{value:{max(6, len(n))}.1%}" for value, n in values)
            predicted_class = f"{names[row.probabilities.argmax()]:{classes}}"
            tqdm.write(f"{readable(row.path):{width}}  {predicted_class}  {cells}")

    return show


def readable(text: object) -> str:
    """A file's name in one line of a terminal, whatever is in it."""
    return escape(str(text))
