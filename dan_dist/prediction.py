"""The story of a prediction: a network from a file, image files, each one's class."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dan_dist.crops import Staged, find_images, stage
from dan_dist.engine import Wanted
from dan_dist.evaluation import predict
from dan_dist.pulse import joined
from dan_dist.weights import load_trained


def main(
    path: Path,
    given: Sequence[Path],
    *,
    classes: str | None = None,
    as_json: bool = False,
    device: str = "auto",
    precision: Wanted = "auto",
) -> int:
    """Prints each image's class and probabilities; returns how many could not be read.

    path, classes: see `load_trained`. given: images, and folders of them; each is taken for the
    crop of one face. as_json: a line of JSON an image in place of a table.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    with joined(device, timeout_s=60.0, on_loss=lambda line: None) as (world, pulse):
        if world.size > 1:
            raise ValueError(f"{world.size} ranks: predict runs as one; evaluate runs on many")
        trained = load_trained(path, classes)
        paths = find_images(given)
        size = trained.image_size
        with tempfile.TemporaryDirectory(prefix="dan_dist-") as folder:
            staged = stage(paths, Path(folder), trained.class_names, size=size, threads=world.cores)
            if staged.paths:
                found = predict(trained, staged.split, size, world, pulse, precision)
            else:
                found = np.empty((0, len(trained.class_names)), np.float32)
        try:
            (tell_json if as_json else tell_table)(staged, found)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads, has seen enough: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return len(staged.faults)


def tell_json(staged: Staged, probabilities: NDArray[np.float32]) -> None:
    """A line of JSON an image: its name and class, each class's probability, or an error."""
    names, rows = staged.split.class_names, iter(probabilities)
    for path, fault in staged.found:
        line: dict[str, Any] = {"image": str(path)}
        if fault:
            line["error"] = fault
        else:
            row = next(rows)
            line["class"] = names[row.argmax()]
            line["probabilities"] = {n: float(v) for n, v in zip(names, row, strict=True)}
        print(json.dumps(line))


def tell_table(staged: Staged, probabilities: NDArray[np.float32]) -> None:
    """A row an image: its name and class, each class's probability in per cent, or an error."""
    names, rows = staged.split.class_names, iter(probabilities)
    paths = [readable(path) for path, _ in staged.found]
    width, classes = max(map(len, ["image", *paths])), max(map(len, ["class", *names]))
    print(f"{'image':{width}}  {'class':{classes}}  " + "  ".join(f"{n:>6}" for n in names))
    for path, (_, fault) in zip(paths, staged.found, strict=True):
        if fault:
            print(f"{path:{width}}  {fault}")
            continue
        row = next(rows)
        values = (f"{value:{max(6, len(n))}.1%}" for value, n in zip(row, names, strict=True))
        print(f"{path:{width}}  {names[row.argmax()]:{classes}}  " + "  ".join(values))


def readable(path: Path) -> str:
    """A file's name in one line of a terminal, whatever is in it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
