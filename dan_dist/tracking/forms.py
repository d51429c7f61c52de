"""The forms of a journal's records: what its readers rely on, in a file that may be damaged."""

from collections.abc import Mapping, Sequence
from typing import Any

from shards.files import check_form, parse_json

_RECORDS: dict[str, dict[str, Any]] = {  # kind → key → type
    "journal": {"id": str},
    "run": {"experiment": str, "name": str, "parent": str | None, "uri": str, "time_ms": int,
            "params": dict, "config": dict, "run_id": str | None, "adopted": str | None,
            "parent_title": str | None},
    "config": {"config": dict, "changed": dict, "step": int},
    "inputs": {"datasets": list, "model": list | None},
    "metrics": {"values": dict, "step": int, "time_ms": int},
    "rollback": {"step": int},
    "status": {"status": str, "tags": dict, "time_ms": int},
    "artifact": {"path": str, "folder": str},
    "model": {"path": str},
}  # fmt: skip
_DATASET = {"name": str, "fingerprint": str, "context": str, "source": str, "release": str,
            "profile": dict, "digest": str | None}  # fmt: skip
_MODEL = {"run_id": str | None, "step": int | None, "journal": str | None, "folder": str | None}
_ENTRIES: dict[str, Any] = {"params": str, "changed": str, "tags": str, "values": int | float}


def parse_record(line: bytes) -> dict[str, Any]:
    """The record in a line of a journal.

    Raises:
        ValueError: there is none.
    """
    record = parse_json(line, {"kind": str})
    if record["kind"] not in _RECORDS:
        raise ValueError(f"kind is {record['kind']!r}, expected one of {', '.join(_RECORDS)}")
    form = _RECORDS[record["kind"]]
    check_form(record, form)
    for name in _ENTRIES.keys() & form.keys():
        check_form(record[name], dict.fromkeys(record[name], _ENTRIES[name]))
    if record["kind"] == "inputs":
        check_each("datasets", record["datasets"], _DATASET)
        for dataset in record["datasets"]:
            check_form(dataset["profile"], {"num_rows": int})
        if (model := record["model"]) is not None:
            if not 2 <= len(model) <= len(_MODEL):  # a former version wrote the first two
                raise ValueError(f"'model' is {model}, expected {', '.join(_MODEL)}")
            check_form(dict(zip(_MODEL, model, strict=False)), _MODEL)
    return record


def check_each(name: str, items: Sequence[Any], form: Mapping[str, Any]) -> None:
    """Checks a list of objects.

    Raises:
        ValueError: an item is none, or not of that form.
    """
    for number, item in enumerate(items):
        check_form({f"{name}.{number}": item}, {f"{name}.{number}": dict})
        check_form(item, form)
