"""Several networks on several data sets: a train × test matrix as table, figure and MLflow run."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dan_dist.data.cache import is_remote
from dan_dist.distributed.heartbeat import session
from dan_dist.evaluation import evaluate as single
from dan_dist.evaluation.figures import matrix_figure
from dan_dist.evaluation.judge import WHOLE
from dan_dist.model.weights import Trained
from dan_dist.options import EvaluateCommand, EvaluateOptions, EvaluationChoices
from dan_dist.run.results import check_result_folder, result_folder, try_result_folder
from dan_dist.tracking.figures import save
from dan_dist.tracking.inputs import dataset_inputs
from dan_dist.tracking.tracker import RunRecord, check_recorded, record_run
from shards.files import sha256_of, write_atomically
from shards.format import ShardSet

FOLDER = "across"  # beside the first checkpoint
REPORT = "matrix.json"
FILES = ("matrix.md", "matrix.csv", REPORT, "matrix.png")

log = logging.getLogger(__name__)


def main(command: EvaluateCommand) -> list[dict[str, Any]]:
    """Evaluates each checkpoint on each set; returns the content of their JSON files.

    Raises:
        ValueError, OSError: bad input, in one line, before anything is computed.
    """
    cells = [[_options(command, path, data) for data in command.data]
             for path in command.checkpoint]  # fmt: skip
    if len(cells) == len(cells[0]) == 1:
        return [single.main(cells[0][0])]
    with (
        session(
            command.device, timeout_s=60.0, on_loss=lambda line: None, stacks=command.checkpoint[0]
        ) as (world, heart),
        ExitStack() as stack,
    ):
        networks = [single.open_network(row[0], world) for row in cells]
        if other := [trained for trained in networks if trained.task != "expression"]:
            raise ValueError(f"{other[0].path} was trained on identities: evaluate it by itself")
        for experiment in {command.experiment or trained.experiment for trained in networks}:
            if not command.no_tracking:
                world.run_once(partial(check_recorded, experiment))
        if (given := command.output) is not None:  # before shards are copied
            world.run_once(lambda: try_result_folder(given))
        sets = [single.open_set(cell, world) for cell in cells[0]]
        opened = [
            [world.run_on_all(partial(single.open_inputs, shards, trained, cell))
             for shards, cell in zip(sets, row, strict=True)]
            for trained, row in zip(networks, cells, strict=True)
        ]  # fmt: skip
        for trained, row in zip(networks, opened, strict=True):
            for shards, inputs in zip(sets, row, strict=True):
                single.check_same(trained, shards, inputs, world)
        rows = unlike([trained.name for trained in networks])
        columns = unlike([_name(data) for data in command.data])
        wanted = command.output or networks[0].path.parent / FOLDER
        world.run_once(lambda: check_result_folder(wanted))
        digests = [sha256_of(trained.path) for trained in networks]
        judged = [
            [rows[k], digest, command.weights, columns[j], sets[j].fingerprint, inputs.split.name,
             inputs.facts.get("groups_sha256")]
            for k, digest in enumerate(digests) for j, inputs in enumerate(opened[k])
        ]  # fmt: skip
        held = result_folder(wanted, REPORT, {"of": judged})
        output = Path(world.run_once(lambda: str(stack.enter_context(held))))
        found = []
        for k, trained in enumerate(networks):
            for j, shards in enumerate(sets):
                log.info("%s on %s", rows[k], columns[j])
                inside = output / f"{rows[k]}-on-{columns[j]}"
                cell = _options(command, command.checkpoint[k], command.data[j], output=inside)
                report = single.evaluate(trained, shards, opened[k][j], cell, world, heart)
                found.append({"run": rows[k], "data": columns[j], **report})
        if world.is_main:
            publish(found, judged, networks, command, output, _used(sets, opened[0], command))
        return found


def _options(
    command: EvaluateCommand, checkpoint: Path, data: str, **changed: Any
) -> EvaluateOptions:
    shared = {f.name: getattr(command, f.name) for f in fields(EvaluationChoices)}
    return EvaluateOptions(checkpoint=checkpoint, data=data, **{**shared, **changed})


def _used(
    sets: Sequence[ShardSet], opened: Sequence[single.Inputs], command: EvaluateCommand
) -> list[dict[str, Any]]:
    """The matrix's data sets; each cell is a run of its own too, which names its network's model.

    opened: the images of each set, as the first network is judged by them.
    """
    found = []
    for shards, inputs, data in zip(sets, opened, command.data, strict=True):
        context = single.CONTEXTS.get(inputs.split.name, "test")
        found += dataset_inputs(shards, {context: inputs.split}, data)
    return found


def _name(data: str) -> str:
    """A set's name by its folder or address, whose query signs it."""
    path = urlsplit(data).path if is_remote(data) else data
    return Path(path.rstrip("/")).name


def unlike(names: Sequence[str]) -> list[str]:
    """The names, of which those that are the same get a number; none is there twice."""
    found: list[str] = []
    for name in names:
        is_alone = names.count(name) == 1
        numbered = (f"{name}-{number}" for number in count(1))
        taken = {*found, *names}
        found.append(name if is_alone else next(own for own in numbered if own not in taken))
    return found


def publish(
    found: Sequence[dict[str, Any]], judged: Sequence[Sequence[Any]], networks: Sequence[Trained],
    command: EvaluateCommand, output: Path, used: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """Writes table, figure and JSON file, records them in MLflow, logs the table.

    judged: of each cell, what tells it from others. used: the data sets, see `dataset_inputs`.
    """
    import pandas as pd  # takes a while to import

    rows, columns = (list(dict.fromkeys(r[key] for r in found)) for key in ("run", "data"))
    tables = {
        key: np.array([report[key] for report in found]).reshape(len(rows), len(columns))
        for key in WHOLE
    }
    text = markdown(found, rows, columns)
    write_atomically(output / "matrix.md", text)
    write_atomically(output / "matrix.csv", pd.DataFrame(flat(found)).to_csv(index=False))
    save(matrix_figure(tables, rows, columns), output / "matrix.png")
    content = {"of": judged, "cells": list(found)}
    write_atomically(output / REPORT, json.dumps(content, indent=1) + "\n")
    if not command.no_tracking:
        record = RunRecord(
            experiment=command.experiment or networks[0].experiment,
            name=f"evaluate {', '.join(rows)} on {', '.join(columns)}",
            params={"runs": ", ".join(rows), "data": ", ".join(columns)},
            tags={"kind": "matrix", "selected_on": ", ".join(t.selected_on for t in networks)},
            config=networks[0].config,
            datasets=used,
        )  # fmt: skip
        metrics = {f"{k}/{r['run']} on {r['data']}": r[k] for r in found for k in WHOLE}
        record_run(output, record, metrics=metrics, step=0, artifacts=FILES)
    for line in text.splitlines():
        log.info("%s", line)
    log.info("matrix: %s", output)


def flat(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a cell of the matrix, for a CSV file."""
    facts = ("run", "data", "dataset", "split", "fingerprint", "selected_on", "images", *WHOLE)
    return [
        {key: report[key] for key in facts}
        | {f"{key}_{end}": report["intervals"][key][k]
           for key in WHOLE for k, end in enumerate(("low", "high"))}
        | {"classes": len(report["classes_met"])}
        for report in found
    ]  # fmt: skip


def markdown(found: Sequence[dict[str, Any]], rows: Sequence[str], columns: Sequence[str]) -> str:
    """The matrix as people read it: a table a metric, then what was left out."""
    by_place = {(report["run"], report["data"]): report for report in found}
    lines = []
    for key in WHOLE:
        lines += [f"{key.replace('_', ' ')}, % (95 %)".capitalize(), "",
                  f"| trained \\ judged on | selected_on | {' | '.join(columns)} |",
                  f"|{'---|' * (len(columns) + 2)}"]  # fmt: skip
        for row in rows:
            own = [by_place[row, column] for column in columns]
            cells = []
            for report in own:
                low, high = (100 * end for end in report["intervals"][key])
                cells.append(f"{100 * report[key]:.2f} ({low:.1f} to {high:.1f})")
            lines.append(f"| {row} | {own[0]['selected_on']} | {' | '.join(cells)} |")
        lines.append("")
    for report in found:
        out = report["left_out"]
        if out["network"] or out["data"]:
            images = [f"{name} ({count} images)" for name, count in out["data"].items()]
            lines.append(f"- {report['run']} on {report['data']}: judged on "
                         f"{len(report['classes_met'])} classes; left out of the network: "
                         f"{', '.join(out['network']) or 'none'}; of the data: "
                         f"{', '.join(images) or 'none'}")  # fmt: skip
    return "\n".join(lines) + "\n"
