"""A configuration from its file and the command line: one YAML each, with dotted overrides.

An unknown key or a value of the wrong type is an error that names it; nothing is ignored. The keys
are in `dan_dist/schema.py`, how their text is read in `dan_dist/reading.py`.
"""

import copy
import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dan_dist.data_schema import Augmentation, Synthetic
from dan_dist.keys import GONE, RENAMED, kind_of, names, names_in, suggest
from dan_dist.reading import (
    NUMBER,
    advice,
    as_written,
    expand,
    locate,
    read_file,
    read_overrides,
)
from dan_dist.redaction import redact_tree
from dan_dist.schema import Config, EngineChoice, Loss, Optim, Schedule, Tracking, Train
from shards.files import write_atomically

__all__ = [
    "Augmentation", "Config", "EngineChoice", "Loss", "Optim", "Schedule", "Synthetic", "Tracking",
    "Train", "find_config", "flatten", "layered", "load_config", "overlay", "resolve",
    "shipped_folder", "to_yaml", "write_config",
]  # fmt: skip

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent
LARGEST = 2**18  # bytes of a file: one that YAML takes seconds to read is none of a person's
CONFIG_FILE = "config.yaml"  # in a training's folder
SHIPPED = "configs"  # beside the package in a clone, inside it where it is installed


class _Dumper(yaml.SafeDumper):
    """Writes what `load_config` reads as the same values."""


for _tag, _form, _first in (
    ("float", NUMBER, "-+0123456789."),
    ("null", re.compile("none", re.IGNORECASE), "nN"),
):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _form, list(_first))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, changed by `section.key=value` overrides.

    path: as `find_config` takes it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable YAML, an unknown key, a wrong type or value; one line that names it.
    """
    found = find_config(path)
    tree = _read(found)
    for given in read_overrides(overrides, Config):
        _set(tree, given.path, given.value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{found}: {_explain(error, tree)}") from error


def layered(*groups: Sequence[str]) -> list[str]:
    """Overrides of several origins, of which a later one replaces a former one's key."""
    return [*{word.partition("=")[0]: word for group in groups for word in group}.values()]


def _text_of(path: Path) -> str:
    """The text of a configuration's file.

    Raises:
        ValueError: it is too large, or not text.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path}: {size:,} bytes, a configuration has {LARGEST:,} at most")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not text in UTF-8 ({error.reason}, byte {error.start})"
        ) from error


def _read(file: Path, readers: Sequence[Path] = ()) -> dict[str, Any]:
    """The keys of a YAML file, laid over those of the configuration that it names as its `base`."""
    tree = read_file(_text_of(file), str(file), Config)
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected sections of keys, found {_shortened(tree)}")
    if (base := tree.pop("base", None)) is None:
        return tree
    if not isinstance(base, str) or file in readers:
        raise ValueError(f"{file}: base is {base!r}, expected another configuration's name")
    base = expand(base, f"{file}: base")
    try:
        below = find_config(base)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{file}: base is {error}") from error
    return overlay(_read(below, [*readers, file]), tree)


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one; where both have a value, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


def find_config(path: str | Path) -> Path:
    """The file of a configuration: a path, or the name of one in `configs`, with its ending or not.

    One in the working folder, or in its `configs`, comes before the shipped one.

    Raises:
        FileNotFoundError: there is none; names the nearest, and all that are shipped.
        ValueError: it is a key, without its value.
    """
    given = Path(path)
    places = [given]
    is_name = given.parts in ((given.name,), (SHIPPED, given.name))
    if is_name:
        places += [Path(SHIPPED, given.name), shipped_folder() / given.name]
    for place in places:
        for file in (place, place.parent / f"{place.name}.yaml"):
            if file.is_file():
                return file
    if given.exists() and not is_name:
        kind = "a folder" if given.is_dir() else "not a file"
        raise FileNotFoundError(f"{path}: no such configuration: {kind}, expected a YAML file")
    if (key := re.split(r"[:=\s]", str(path), maxsplit=1)[0]) in names():
        raise ValueError(f"{path}: a key, expected {key}=value")
    known = sorted(file.stem for file in shipped_folder().glob("*.yaml"))
    near = difflib.get_close_matches(given.stem.lower(), known, 1)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise FileNotFoundError(f"{path}: no such configuration; {hint} {', '.join(known)}")


def shipped_folder() -> Path:
    """The folder of the configurations that come with this code."""
    inside = PACKAGE / SHIPPED
    return inside if inside.is_dir() else PACKAGE.parent / SHIPPED


def find_output(words: Sequence[str]) -> Path | None:
    """The folder of a training, as far as its command line and configuration can be read.

    None: they do not name it, or not so that it can be read. What is wrong elsewhere in the file
    is in nobody's way.
    """
    given = [word for word in words if word.startswith(("train.output=", "train="))]
    try:
        for word in reversed(given):
            for own in read_overrides([word], Config):
                if own.path == ("train", "output"):
                    return _as_path(own.value)
        known = [w for w in words if w != "--config" and not w.startswith("--local_rank=")]
        names = [w.removeprefix("--config=") for w in known]
        if any(name.startswith("-") for name in names):
            return None
        found = find_config(next((name for name in names if "=" not in name), "demo"))
        try:
            return _as_path(_read(found)["train"]["output"])
        except ValueError:  # of any key
            return _output_of(found)
    except (ValueError, OSError, KeyError, TypeError, yaml.YAMLError, RecursionError):
        return None


def _as_path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value else None


def _output_of(file: Path, readers: Sequence[Path] = ()) -> Path | None:
    """The value of train.output where a file, or the one that it is based on, has it once.

    None: it does not, or names a part of it by `<<`. The rest of the file may be wrong.
    """
    text = _text_of(file)
    top = yaml.compose(text, yaml.BaseLoader)
    sections = _nodes(top, "train")
    if any(_nodes(node, "<<") for node in (top, *sections)):
        return None
    found = [value for train in sections for value in _nodes(train, "output")]
    bases = [node.value for node in _nodes(top, "base") if isinstance(node, yaml.ScalarNode)]
    if not found and len(bases) == 1 and file not in readers:
        return _output_of(find_config(expand(bases[0], "base")), [*readers, file])
    if len(found) != 1:
        return None
    start, end = found[0].start_mark.index, found[0].end_mark.index
    rest = text[end:].split("\n", 1)[0]
    comment = rest if rest.lstrip().startswith("#") else ""  # or a part of the value: it is refused
    alone = read_file(f"train:\n  output: {text[start:end]}{comment}", str(file), Config)
    return _as_path(alone["train"]["output"])


def _nodes(node: yaml.Node | None, key: str) -> list[yaml.Node]:
    """The values of a mapping's key, which may stand there several times."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return [value for own, value in pairs if own.value == key]


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a checkpoint holds it, flat.

    It may be an earlier version's: keys that have another name now are renamed, keys that have gone
    are left out, and new keys have their default.

    Raises:
        ValueError: it is none of ours; one line that names the key.
    """
    known = copy.deepcopy(dict(tree))
    for old in (*GONE, *RENAMED):
        section, _, own = old.rpartition(".")
        keys = known.get(section) if section else known
        if isinstance(keys, dict) and own in keys:
            value = keys.pop(own)
            if old in RENAMED:
                _set(known, RENAMED[old].split("."), value)
    try:
        return flatten(Config.model_validate(known).model_dump())
    except ValidationError as error:
        raise ValueError(_explain(error, known)) from error


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration (`Config.model_dump()`) as {"section.key": value}."""
    flat: dict[str, Any] = {}

    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_yaml(config: Config) -> str:
    """The configuration with all its keys, as a file that `load_config` reads as the same.

    What signs an address is hidden.
    """
    tree = redact_tree(as_written(config.model_dump(), Config))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_config(config: Config, folder: Path) -> None:
    """Writes `config.yaml` into a run's folder; a disk that is full costs the run nothing else."""
    path = folder / CONFIG_FILE
    try:
        write_atomically(path, to_yaml(config))
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def _explain(error: ValidationError, tree: Any) -> str:
    """The first fault in one line: where, what was found, what was expected, how to write it."""
    faults = error.errors()
    # Where a required key is misspelt, it is missing as well.
    first = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where, found = [str(part) for part in first["loc"]], first["input"]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        hint = suggest(name)
        while not hint and isinstance(found, dict) and len(found) == 1:  # a key of no section
            (own, found), *_ = found.items()
            name += f".{own}"
            hint = suggest(name)
        known = ", ".join(names_in(".".join(where[:-1])))
        return f"unknown key '{name}'; {hint or f'known are {known}'}"
    if first["type"] == "missing":
        return f"'{name}' is missing"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    path = _path_in(tree, first["loc"])
    name = ".".join(path)
    expected = first["msg"][0].lower() + first["msg"][1:]
    if len(path) < len(where):  # one of several forms
        expected = f"expected {kind_of(name)}"
    end = advice(found, locate(name, Config)[1])
    return f"{name} is {_shortened(found)}: {expected}{end}"


def _path_in(tree: Any, places: Sequence[int | str]) -> list[str]:
    """The part of a fault's place that is keys of the tree; pydantic adds the form of a value."""
    path: list[str] = []
    for place in places:
        try:
            tree = tree[place]
        except (KeyError, IndexError, TypeError):
            break
        path.append(str(place))
    return path


def _shortened(value: Any, most: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
