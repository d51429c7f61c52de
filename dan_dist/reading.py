"""The one rule by which a configuration's text becomes values, in files and on the command line.

YAML gives the structure alone: which keys there are, and their texts. What a key takes decides how
its text is read, not what the text looks like: `007` is a name where the key takes text, and no
number where it takes one. What a key does not take stays text, which the schema refuses by name.
Nothing is executed: tags are refused.
"""

import logging
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.resolver import Resolver

from dan_dist.values import Reads, Section, variables

log = logging.getLogger(__name__)

MOST_VALUES, LONGEST_NUMBER = 50_000, 40
NULLS = ("null", "none", "~")
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)", re.ASCII)
NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)
NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
YAML_1_1: Any = Resolver()
PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
UNKNOWN = object()  # in place of a type: no key has this name, as the schema will find

Tree = dict[str, Any]


class Kind(NamedTuple):
    """One of the forms of value that a key takes."""

    type: Any  # or a choice: a text; or UNKNOWN
    reads: Reads


class Given(NamedTuple):
    """A key of the command line with its value."""

    path: tuple[str, ...]
    value: Any
    word: str  # as it was typed


def kinds(hint: Any) -> list[Kind]:
    """The forms of value that an annotation allows."""
    reads = Reads()
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        reads = next((note for note in notes if isinstance(note, Reads)), reads)
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in kinds(part)]
    if get_origin(hint) is Literal:
        return [Kind(choice, reads) for choice in get_args(hint)]
    return [Kind(hint, reads)]


def inside(hint: Any, own: str) -> Any:
    """What the key `own` of a mapping takes, or any entry of a list."""
    for kind in kinds(hint):
        if kind.reads.keys is not None:
            return kind.reads.keys.get(own, UNKNOWN)
        if _is_section(kind.type):
            fields = get_type_hints(kind.type, include_extras=True)
            return fields[own] if own in kind.type.model_fields else UNKNOWN
        if get_origin(kind.type) in (dict, list):
            return get_args(kind.type)[-1]
        if kind.type is Any:
            return Any
    return UNKNOWN


def takes_brackets(hint: Any) -> bool:
    """Whether a list or a mapping may stand there."""
    return any(kind.type in (Any, UNKNOWN) or get_origin(kind.type) in (dict, list)
               or _is_section(kind.type) for kind in kinds(hint))  # fmt: skip


def _is_section(form: Any) -> bool:
    return isinstance(form, type) and issubclass(form, Section)


def locate(name: str, hint: Any) -> tuple[tuple[str, ...], Any]:
    """The path of a dotted key, and what it takes. Dots in the name of a tag are its own."""
    path: list[str] = []
    rest: str | None = name
    while rest is not None:
        own, dot, after = rest.partition(".")
        found = inside(hint, own)
        is_open = any(get_origin(k.type) is dict and k.reads.keys is None for k in kinds(hint))
        if is_open and not takes_brackets(found):  # a mapping of names
            own, dot = rest, ""
        path.append(own)
        hint, rest = found, after if dot else None
    return tuple(path), hint


def read_file(text: str, where: str, hint: Any) -> Any:
    """The values of a file's text.

    where: the file's name, for errors.

    Raises:
        ValueError: not YAML, a key that stands twice, a value without a meaning; in one line.
    """
    return _Reading(text, where).values(hint)


def read_overrides(overrides: Iterable[str], hint: Any) -> list[Given]:
    """The keys of a command line, each `section.key=value`; a section gives each key that it names.

    A later one replaces a former one, as launchers add to what they are given; the log names both.

    Raises:
        ValueError: one that is not of this form, or that has no meaning.
    """
    found: list[Given] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"override '{word}': expected section.key=value")
        path, own = locate(key, hint)
        value = _Reading(text, " ".join(word.split()), ".".join(path)).value(own)
        for given in _leaves(path, value, own, word):
            for other in found:
                shared = min(len(given.path), len(other.path))
                if given.path[:shared] == other.path[:shared] and given.value != other.value:
                    log.info("%s replaces %s", word, other.word)
            found.append(given)
    return found


def _leaves(path: tuple[str, ...], value: Any, hint: Any, word: str) -> Iterator[Given]:
    if any(_is_section(kind.type) for kind in kinds(hint)) and isinstance(value, dict):
        for own, inner in value.items():
            yield from _leaves((*path, own), inner, inside(hint, own), word)
    else:
        yield Given(path, value, word)


class _Reading:
    """One text: a file's, or the value of one key of the command line."""

    def __init__(self, text: str, where: str, name: str = "") -> None:
        self.text, self.where, self.name = text, where, name
        self.count = self.end = 0  # of the values; the place behind the last one

    def values(self, hint: Any) -> Any:
        """Of a whole YAML text."""
        try:
            try:
                node = yaml.compose(self.text, yaml.BaseLoader)
            except (ValueError, OverflowError) as error:  # of an escape that is no character
                raise ValueError(f"{self.where}: not YAML: {error}") from error
            if node is None:
                return None
            self.end = node.end_mark.index
            return self._read(node, hint, self.name)
        except yaml.YAMLError as error:
            line = " ".join(str(error).replace('in "<unicode string>",', "at").split())
            advice = "; write spaces, not tabs" if "'\\t'" in line else ""
            raise ValueError(f"{self.where}: not YAML: {line}{advice}") from error
        except RecursionError as error:
            raise ValueError(f"{self.where}: values are nested too deeply") from error

    def value(self, hint: Any) -> Any:
        """Of one key: in brackets where it takes them, in quotes, or the whole text as it is."""
        text, brackets = self.text.strip(), "[{" if takes_brackets(hint) else ""
        if not text.startswith(("'", '"', *brackets)):
            return self._plain(self.text, hint, self.name)
        self.text = text
        found = self.values(hint)
        if self.end != len(text):  # a comment
            raise ValueError(f"{self.where}: {text[self.end :]!r} stands behind the value")
        return found

    def _read(self, node: yaml.Node, hint: Any, name: str) -> Any:
        self.count += 1
        if self.count > MOST_VALUES:
            raise ValueError(f"{self.where}: more than {MOST_VALUES:,} values")
        if node.tag not in PLAIN_TAGS:
            raise self._error(node, f"{name} has the tag {node.tag!r}, expected a value without")
        if isinstance(node, yaml.MappingNode):
            return {
                own: self._read(value, inside(hint, own), f"{name}.{own}".lstrip("."))
                for own, value in self._pairs(node).items()
            }
        if isinstance(node, yaml.SequenceNode):
            return [
                self._read(v, inside(hint, ""), f"{name}.{k}") for k, v in enumerate(node.value)
            ]
        assert isinstance(node, yaml.ScalarNode)
        if node.style is not None:  # in quotes
            return self._text(node.value, hint, name)
        found = self._plain(node.value, hint, name)
        rest = self.text[node.end_mark.index :].split("\n", 1)[0].rstrip()
        if isinstance(found, str) and re.match(r"[ \t]+#[^\s#]", rest):
            raise self._error(
                node, f"{name}: is {rest.strip()!r} a comment, or part of the value? Write "
                f"'{node.value}{rest}' in quotes, or a space behind the #",
            )  # fmt: skip
        return found

    def _pairs(self, node: yaml.MappingNode) -> dict[str, yaml.Node]:
        """A mapping's values by the text of their keys; those that `<<` names come last."""
        found: dict[str, yaml.Node] = {}
        lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in PLAIN_TAGS:
                raise self._error(key, "a key is not a text")
            if key.value in lines:
                raise self._error(
                    key,
                    f"'{key.value}' stands twice, in line {lines[key.value]} too; write it once",
                )
            lines[key.value] = key.start_mark.line + 1
            if key.value == "<<" and key.style is None:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                found[key.value] = value
        for other in merged:
            self.count += 1
            if not isinstance(other, yaml.MappingNode) or self.count > MOST_VALUES:
                raise self._error(node, "<< names what is no mapping")
            found = {**self._pairs(other), **found}
        return found

    def _error(self, node: yaml.Node, text: str) -> ValueError:
        return ValueError(f"{self.where}: line {node.start_mark.line + 1}: {text}")

    def _plain(self, text: str, hint: Any, name: str) -> Any:
        """A text that stands in no quotes."""
        forms, word = [kind.type for kind in kinds(hint)], text.strip().lower()
        if UNKNOWN in forms:
            return text
        if not word:
            raise ValueError(
                f"{self.where}: {name or 'it'} has no value; write null, or '\"\"' for no text"
            )
        if word in NULLS and types.NoneType in forms:
            return None
        if word in NULLS and "none" in forms:
            return "none"
        if word in NULLS and any(kind.reads.path for kind in kinds(hint)):
            line = f"{name} is {word}, a word for null, which it does not take"
            raise ValueError(f"{self.where}: {line}; write ./{word} for a folder of that name")
        if word in SWITCHES and bool in forms:
            return SWITCHES[word]
        if INTEGER.fullmatch(word) and int in forms and len(word) < LONGEST_NUMBER:
            return int(word)
        if float in forms and NUMBER.fullmatch(word):
            return float(word)
        if float in forms and NOT_FINITE.fullmatch(word):  # which the schema refuses
            return float(word.replace(".", ""))
        if Any in forms:
            return self._untyped(text.strip(), name)
        return self._text(text, hint, name)

    def _untyped(self, text: str, name: str) -> Any:
        """Where anything may stand, only what every version of YAML reads alike is no text."""
        if text in ("null", "~"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if INTEGER.fullmatch(text) and len(text) < LONGEST_NUMBER:
            return int(text)
        if NUMBER.fullmatch(text):
            return float(text)
        if YAML_1_1.resolve(yaml.ScalarNode, text, (True, False)) != PLAIN_TAGS[0]:
            raise ValueError(
                f"{self.where}: {name} is {text}, which versions of YAML read in several ways; "
                f"write '\"{text}\"' for the text, or a decimal number, true, false or null"
            )
        return text

    def _text(self, text: str, hint: Any, name: str) -> str:
        return expand(text, name) if any(kind.reads.path for kind in kinds(hint)) else text


def expand(text: str, name: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` expanded; `$$` is a dollar sign.

    Raises:
        ValueError: there is no such variable, or it is empty; there is no such user.
    """
    end = "write $$ for a dollar sign"
    try:
        known = {key: value for key, value in variables().items() if value}
        text, typed = Template(text).substitute(known), text
    except KeyError as error:
        line = f"{name} is {text!r}: ${error.args[0]} is not set in the environment"
        raise ValueError(f"{line}; set it, or {end}") from None
    except ValueError:
        raise ValueError(f"{name} is {text!r}: a $ without a variable's name; {end}") from None
    if not text.startswith("~"):
        return text
    user, slash, rest = text.partition("/")
    try:
        return f"{Path(user).expanduser()}{slash}{rest}"
    except RuntimeError:
        line = f"{name} is {typed!r}: no home folder is known for {user}"
        raise ValueError(f"{line}; write ./{user} for a folder of that name") from None


def as_written(value: Any, hint: Any) -> Any:
    """A value as a file that is read again must hold it: with `$$` for each `$` of a path."""
    if isinstance(value, Mapping):
        return {own: as_written(inner, inside(hint, own)) for own, inner in value.items()}
    if isinstance(value, list):
        return [as_written(inner, inside(hint, "")) for inner in value]
    is_path = isinstance(value, str) and any(kind.reads.path for kind in kinds(hint))
    return value.replace("$", "$$") if is_path else value


def advice(found: Any, hint: Any) -> str:
    """How to write what a key did not take; empty where that is not known."""
    forms = [kind.type for kind in kinds(hint)]
    if not isinstance(found, str):
        return "; write it in quotes" if str in forms and isinstance(found, dict | list) else ""
    if any(get_origin(form) is list for form in forms):
        return f"; write [{found.strip('()')}]"
    if bool in forms and found.strip() in ("0", "1"):
        return f"; write {'true' if found.strip() == '1' else 'false'}"
    if types.NoneType in forms and SWITCHES.get(found.strip().lower()) is False:
        return "; write null"
    if not {int, float} & {form for form in forms if isinstance(form, type)}:
        return ""
    if INTEGER.fullmatch(found) or (float in forms and NUMBER.fullmatch(found)):
        return "; write it without quotes" if len(found) < LONGEST_NUMBER else ""
    if re.fullmatch(r"0[0-7]+", found):
        return f"; write {int(found)}, or {int(found, 8)} where it is octal"
    if re.fullmatch(r"[-+]?0[0-9]*(\.[0-9]*)?", found):
        return f"; write {found.lstrip('+-0') or 0}"
    try:
        number = float(found) if NUMBER.fullmatch(found) else yaml.safe_load(found)
    except (yaml.YAMLError, ValueError):
        return ""
    if isinstance(number, float) and number.is_integer() and abs(number) < 1e15:
        number = int(number)
    return f"; write {number}" if type(number) in (int, float) and number - number == 0 else ""
