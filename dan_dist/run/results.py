"""Folders of results: a result of something else is never overwritten."""

import json
import logging
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def result_folder(wanted: Path, report: str, own: Mapping[str, Any]) -> Path:
    """`wanted` or, where that holds a result of something else, the same with the next number.

    report: the JSON file of a result. own: the parts of its content that name what it is of: a
    result with the same parts is replaced.
    """
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    for folder in chain([wanted], numbered):
        if not (folder / report).exists() or _is_of(folder / report, own):
            if folder != wanted:
                log.info("%s holds another result and stays as it is", wanted)
            return folder
    raise AssertionError("numbers do not end")


def _is_of(path: Path, own: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(key) == value for key, value in own.items())
