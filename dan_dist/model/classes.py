"""The classes of data sets by name: their label orders, and one order among another."""

from collections.abc import Sequence
from typing import Any

from shards.command import escape, is_printable
from shards.release import common_name
from shards.releases import affectnet, rafdb, sfew

# Label orders by the name of the recipe whose data set has them
ORDERS = {
    "affectnet8": affectnet.CLASSES,
    "affectnet7": affectnet.CLASSES[:7],
    "rafdb": rafdb.CLASSES,
    "sfew": tuple(sfew.CLASSES.values()),
}


def class_order(classes: str) -> tuple[str, ...]:
    """Class names in label order: those of a recipe in ORDERS, or names with commas.

    Anything else, or a name that stands there twice, is a ValueError.
    """
    if "," in classes:
        given = [name.strip() for name in classes.split(",")]
        check_names(given, classes)
        return tuple(given)
    if classes not in ORDERS:
        raise ValueError(f"classes '{classes}': expected {', '.join(ORDERS)}, or names with commas")
    return ORDERS[classes]


def columns_of(class_names: tuple[str, ...], wanted: tuple[str, ...]) -> list[int] | None:
    """Where each of the `wanted` classes stands in `class_names`; None where the sets differ."""
    try:
        met = meet(class_names, wanted)
    except ValueError:
        return None
    is_whole = len(met) == len(class_names) == len(wanted)
    return [own for own, _ in met] if is_whole else None


def meet(class_names: tuple[str, ...], others: tuple[str, ...]) -> list[tuple[int, int]]:
    """Each class that both have, by its place in both, in the order of `others`.

    Data sets order their classes differently, and have different names for some (`common_name`).
    Two names for one class on one side are a ValueError.
    """
    own, other = list(class_names), list(others)
    if set(own) != set(other):
        own, other = ([common_name(name) for name in names] for names in (own, other))
    for known, names in ((own, class_names), (other, others)):
        if len(set(known)) < len(known):
            twice = next(name for name in known if known.count(name) > 1)
            same = [name for name, found in zip(names, known, strict=True) if found == twice]
            raise ValueError(f"classes {', '.join(same)}: two names for one class")
    return [(own.index(name), k) for k, name in enumerate(other) if name in own]


def check_names(names: Any, where: str) -> None:
    """Refuses, as a ValueError, all but a list of different names that a terminal can show."""
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{where}: classes {names!r}, expected names")
    if odd := [n for n in names if not is_printable(n)]:
        raise ValueError(f"{where}: class '{escape(odd[0])}', expected a name that can be printed")
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"{where}: classes {join_names(names)}: a name stands there twice, or none"
        )


def join_names(names: Sequence[str], most: int = 10) -> str:
    """Names as text, the first `most` of them and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
