"""The configuration's keys by name: their texts for people, and the right one for a wrong one."""

from shards.command import end, listen, open_output

if __name__ == "__main__":
    listen()  # a signal may come during the imports below

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dan_dist.schema import Config
from dan_dist.values import FAR

# Keys of earlier versions, which the configurations in checkpoints hold: those that have another
# name now, and those that nothing reads any more.
RENAMED = {
    "loss.lambda_affinity": "loss.lambda_fcn",
    "loss.lambda_partition": "loss.lambda_afn",
}
GONE: tuple[str, ...] = ()

COLUMNS, NAME_WIDTH = 100, 28
KINDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
    "array": "list", "object": "mapping",
}  # fmt: skip
BOUNDS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {:g}",
    "multipleOf": "a multiple of {}",
}  # fmt: skip


class Key(NamedTuple):
    """One key of the schema."""

    name: str  # dotted
    kind: str  # of its values
    default: str | None  # None where it must be given
    description: str


class Group(NamedTuple):
    """A section of the schema."""

    name: str  # dotted; of the whole, empty
    description: str
    keys: list[Key]


def groups() -> list[Group]:
    """The schema's sections with their own keys, in its order."""
    tree = Config.model_json_schema()
    return list(_groups("", tree, tree["$defs"]))


def _groups(name: str, tree: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[Group]:
    keys, inner = [], []
    for own, field in tree["properties"].items():
        full = f"{name}.{own}" if name else own
        choices = field.get("anyOf", [field])
        if "$ref" in choices[0]:
            inner.append((full, sections[choices[0]["$ref"].rsplit("/", 1)[-1]]))
            continue
        is_required = own in tree.get("required", ())
        default = None if is_required else json.dumps(field["default"]).strip('"')
        kind = " or ".join(_kind(choice) for choice in choices)
        keys.append(Key(full, kind, default, field.get("description", "")))
    yield Group(name, tree["description"], keys)
    for full, section in inner:
        yield from _groups(full, section, sections)


def _kind(field: Mapping[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "enum" in field:
        return ", ".join(field["enum"][:-1]) + f" or {field['enum'][-1]}"
    if "const" in field:
        return str(field["const"])
    if field["type"] == "null":
        return "null"
    field = {k: v for k, v in field.items() if k != "maximum" or v < FAR}  # nobody needs it
    if "minimum" in field and "maximum" in field:
        steps = f", {BOUNDS['multipleOf'].format(n)}" if (n := field.get("multipleOf")) else ""
        return f"{KINDS[field['type']]} from {field['minimum']} to {field['maximum']}{steps}"
    bounds = [text.format(field[name]) for name, text in BOUNDS.items() if name in field]
    if field["type"] == "array":
        count = f"{field['minItems']} × " if "minItems" in field else ""
        return f"list of {count}{_kind(field['items'])}"
    return " ".join([KINDS[field["type"]], ", ".join(bounds)]).strip()


def kind_of(name: str) -> str:
    """The values that a key takes, in words; those of an entry are its list's."""
    found = (
        key.kind
        for group in groups()
        for key in group.keys
        if f"{name}.".startswith(f"{key.name}.")
    )
    return next(found, "another value")


def describe() -> str:
    """Every key by section: its description, its values and its default."""
    lines = []
    for group in groups():
        lines.append(f"\n{group.name}: {group.description}" if group.name else "")
        for key in group.keys:
            end = "required" if key.default is None else f"default {key.default}"
            text = f"{key.description} [{key.kind}; {end}]"
            first, *rest = textwrap.wrap(text, COLUMNS - NAME_WIDTH, break_on_hyphens=False)
            lines.append(f"  {key.name:{NAME_WIDTH - 3}} {first}")
            lines += [" " * NAME_WIDTH + line for line in rest]
    return "\n".join(lines).strip("\n")


def table() -> str:
    """Every key as a row of a Markdown table: what `python -m dan_dist.keys` prints."""
    rows = ["| key | values | default | |", "|---|---|---|---|"]
    for key in (key for group in groups() for key in group.keys):
        default = "required" if key.default is None else f"`{key.default}`"
        rows.append(f"| `{key.name}` | {key.kind} | {default} | {key.description} |")
    return "\n".join(rows)


def names() -> list[str]:
    """All keys and sections, dotted, in the schema's order."""
    found = groups()
    return [key.name for group in found for key in group.keys] + [g.name for g in found if g.name]


def names_in(section: str) -> list[str]:
    """The keys and sections of a dotted section, by their own names."""
    split = (name.rpartition(".") for name in names())
    return [own for parent, _, own in split if parent == section]


def suggest(name: str) -> str:
    """A hint at the key that is meant by a name which is none; empty where none is near."""
    if name in GONE:
        return "it has gone, as nothing reads it"
    if name in RENAMED:
        return f"it is '{RENAMED[name]}' now"
    if name in names():  # of a file
        section, _, own = name.rpartition(".")
        return f"write it below its section, {section}: {{{own}: …}}"
    quoted = [f"'{key}'" for key in candidates(name)]
    return f"did you mean {' or '.join(quoted)}?" if quoted else ""


def candidates(name: str) -> list[str]:
    """The keys or sections that may be meant by a name, dotted or not; none where none is near.

    The same name in other sections, or else the nearest in its own, or else in another.
    """
    section, _, own = name.rpartition(".")
    by_own: dict[str, list[str]] = {}
    for known in names():
        by_own.setdefault(known.rpartition(".")[2], []).append(known)
    if own in by_own:
        return by_own[own]
    if near := difflib.get_close_matches(own, names_in(section), 1, cutoff=0.5):
        return [f"{section}.{near[0]}".lstrip(".")]
    if near := difflib.get_close_matches(own, by_own, 1, cutoff=0.75):
        return by_own[near[0]]
    return []


if __name__ == "__main__":
    open_output()
    print(table())
    end(0)
