"""The values of configuration keys: bounds, checks, the strict section; and the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, eq=False)  # hashed by identity, as an annotation must be
class Reads:
    """How a key's text is read where its type does not settle it; see `dan_dist.reading`."""

    path: bool = False  # `~` and `$NAME` are expanded
    keys: Mapping[str, Any] | None = None  # of a mapping: what each of its keys takes


PathText = Annotated[str, Reads(path=True)]
Probability = Annotated[float, Field(ge=0, le=1)]
FAR = 1_000_000
# Bounds above what anybody needs keep slips of the keyboard from sums that overflow.
Positive = Annotated[float, Field(gt=0, le=FAR)]
Weight = Annotated[float, Field(ge=0, le=FAR)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Amount = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Part = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]

Number = int | float
SOURCE = {"path": PathText, "share": Number, "classes": dict[str, str]}
ORDER: dict[str, Any] = {"power": Number, "effective": Number, "shares": dict[str, Number]}
ORDERS = {**ORDER, "epochs": int}
for _end in ("from", "to"):
    ORDERS[_end] = str | Annotated[dict[str, Any], Reads(keys=ORDER)]

SHARDS = "{path: …, share: a number above 0, classes: {its name: the training's, …}}"
SAMPLING = (
    "balanced, shuffle, {power: 0 to 10}, {effective: 0 or more, below 1}, "
    "{shares: {class: 0 or more, …}} or {from: …, to: …, epochs: 1 to 2048}"
)


def check_shards(value: Any) -> Any:
    """Refuses a list of sets in which one is not as SHARDS has it."""
    if isinstance(value, str):
        return value
    for source in value:
        names, share = source.get("classes", {}), source.get("share", 1)
        is_good = (
            {"path"} <= {*source} <= {"path", "share", "classes"}
            and isinstance(source["path"], str)
            and _is_number(share) and share > 0
            and isinstance(names, dict)
            and all(isinstance(name, str) for pair in names.items() for name in pair)
        )  # fmt: skip
        if not is_good:
            raise ValueError(f"data.shards: {source!r}, expected {SHARDS}")
    if not value:
        raise ValueError("data.shards is an empty list, expected at least one set")
    return value


def check_sampling(value: Any) -> Any:
    """Refuses what is not as SAMPLING has it."""
    if not _is_sampling(value, may_change=True):
        raise ValueError(f"data.sampling is {value!r}, expected {SAMPLING}")
    return value


def _is_sampling(value: Any, *, may_change: bool) -> bool:
    if not isinstance(value, dict):
        return value in ("balanced", "shuffle")
    if {*value} == {"from", "to", "epochs"} and may_change:
        ends = [_is_sampling(value[key], may_change=False) for key in ("from", "to")]
        return all(ends) and type(value["epochs"]) is int and 1 <= value["epochs"] <= 2048
    if {*value} == {"shares"} and isinstance(given := value["shares"], dict):
        names, numbers = given.keys(), given.values()
        is_good = all(isinstance(n, str) for n in names) and all(map(_is_number, numbers))
        return is_good and min(numbers, default=-1) >= 0 and max(numbers) > 0
    if {*value} in ({"power"}, {"effective"}) and _is_number(number := next(iter(value.values()))):
        return bool(0 <= number <= 10 and ("power" in value or number < 1))
    return False


def check_fold(value: Any) -> Any:
    """Refuses what is not k/n with 1 ≤ k ≤ n and n ≥ 2."""
    if value is not None:
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", value)
        if not found or not int(found[1]) <= int(found[2]) >= 2:
            raise ValueError(f"data.fold is {value!r}, expected k/n with 1 ≤ k ≤ n and n ≥ 2")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= FAR


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversions (an int is a valid float), no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def variables() -> dict[str, str]:
    """A copy of this process's environment, in which threads of MLflow's change some meanwhile."""
    return {name: os.environ.get(name, "") for name in list(os.environ)}
