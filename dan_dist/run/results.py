"""Folders of results: a result of something else is never overwritten, nor is a training."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from dan_dist.config import CONFIG_FILE
from dan_dist.run.folder import check_writable, no_new_folders, steps_saved
from shards.files import locked

log = logging.getLogger(__name__)


def check_result_folder(folder: Path) -> None:
    """Creates the folder of a result, before anything is computed.

    Raises:
        OSError: it cannot be written. ValueError: it is a training's, whose predictions and record
            in MLflow have the names of a result's.
    """
    check_writable(folder, "--output")
    if _is_training(folder):
        raise ValueError(f"--output {folder} is the folder of a training; give one of its own")


def try_result_folder(folder: Path) -> None:
    """As `check_result_folder`, and leaves no new folder: what is to be computed may be refused."""
    with no_new_folders(folder):
        check_result_folder(folder)


@contextmanager
def result_folder(wanted: Path, report: str, own: Mapping[str, Any]) -> Iterator[Path]:
    """`wanted` or, where that holds a result of something else, the same with the next number.

    No other process gets the folder meanwhile: it waits, and looks for itself then.

    report: the JSON file of a result, which is written last. own: the parts of its content that
    name what it is of: a result with the same parts is replaced.
    """
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    for folder in chain([wanted], numbered):
        if _is_training(folder):  # its lock would be waited for
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"another process writes a result into {folder}", wait=True):
            other = (folder / report).exists() and not _is_of(folder / report, own)
            if other or _is_training(folder):
                continue
            if folder != wanted:
                log.info("%s holds another result and stays as it is", wanted)
            yield folder
            return


def _is_training(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() or bool(steps_saved(folder))


def _is_of(path: Path, own: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(key) == value for key, value in own.items())
