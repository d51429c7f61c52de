"""The story of a prediction: a network from a file, image files, the class of each."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.crops import PackedImages, find_images, pack_images
from dan_dist.distributed.heartbeat import session
from dan_dist.evaluation.predictions import predict
from dan_dist.model.weights import load_trained
from dan_dist.options import PredictOptions
from shards.files import scratch_folder


def main(options: PredictOptions) -> int:
    """Prints each image's class and probabilities; returns how many could not be read.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    print("each image is taken for the crop of one face", file=sys.stderr)
    with session(options.device, timeout_s=60.0, on_loss=lambda line: None) as (world, heart):
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: predict runs as one; evaluate runs on many")
        trained = load_trained(options.checkpoint, options.classes, weights=options.weights)
        paths = find_images(options.images)
        names, size = trained.class_names, trained.image_size
        with scratch_folder() as folder:
            packed = pack_images(paths, folder, size=size, threads=world.cores)
            rows = np.empty((0, len(names)), np.float32)
            if packed.paths:
                rows = predict(trained, packed.split, world, heart, options.precision)
        try:
            (print_json if options.json else print_table)(packed, names, rows)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has ended: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return len(packed.faults)


def print_json(
    packed: PackedImages, names: tuple[str, ...], probabilities: NDArray[np.float32]
) -> None:
    """A line of JSON an image: its name and class, each class's probability, or an error."""
    rows = iter(probabilities)
    for path, fault in packed.given:
        line: dict[str, Any] = {"image": str(path)}
        if fault:
            line["error"] = fault
        else:
            row = next(rows)
            line["class"] = names[row.argmax()]
            line["probabilities"] = {n: float(v) for n, v in zip(names, row, strict=True)}
        print(json.dumps(line))


def print_table(
    packed: PackedImages, names: tuple[str, ...], probabilities: NDArray[np.float32]
) -> None:
    """A row an image: its name and class, each class's probability in per cent, or an error."""
    rows, paths = iter(probabilities), [readable(path) for path, _ in packed.given]
    width, classes = max(map(len, ["image", *paths])), max(map(len, ["class", *names]))
    print(f"{'image':{width}}  {'class':{classes}}  " + "  ".join(f"{n:>6}" for n in names))
    for path, (_, fault) in zip(paths, packed.given, strict=True):
        if fault:
            print(f"{path:{width}}  {fault}")
            continue
        row = next(rows)
        values = (f"{value:{max(6, len(n))}.1%}" for value, n in zip(row, names, strict=True))
        print(f"{path:{width}}  {names[row.argmax()]:{classes}}  " + "  ".join(values))


def readable(path: Path) -> str:
    """A file's name in one line of a terminal, whatever is in it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
