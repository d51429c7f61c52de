"""The run in MLflow that holds others, those of an ablation, and what their comparison finds."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from dan_dist.redaction import redact
from dan_dist.tracking.faults import noted, reason_of, send_entries
from dan_dist.tracking.names import TAG_LETTERS, fit, fit_value
from dan_dist.tracking.provenance import provenance
from dan_dist.tracking.store import (
    KIND_OF_WORK,
    connect,
    experiment_number,
    parent_run,
    run_page,
    server_of,
    store,
)
from dan_dist.tracking.tracker import replay

log = logging.getLogger(__name__)

VIEW_TAG = "mlflow.sharedViewState."  # of an experiment: a view of its runs that was shared


@dataclass(frozen=True)
class ParentRecord:
    """What MLflow holds of a run that holds others."""

    experiment: str
    name: str  # by which runs find it
    title: str  # what people see
    note: str  # Markdown, MLflow's description of the run; {image} stands for `image`'s address
    status: str  # RUNNING, FINISHED or FAILED
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None  # the file that the description shows
    # MLflow's charts of its runs as they open; {run_id} stands for that of this run
    view: Mapping[str, Any] = field(default_factory=dict)


class Pages(NamedTuple):
    """The addresses of what was recorded."""

    run: str
    view: str  # the runs, as `ParentRecord.view` describes
    experiment_id: str


def publish(folder: Path, record: ParentRecord, journals: Sequence[Path]) -> Pages:
    """Puts the files of a folder into the run that holds others, made if need be.

    journals: folders of the runs that it holds; what MLflow has missed of them is sent first.

    The status first: it is taken whatever becomes of the rest, of which the log names what MLflow
    refuses.

    Raises:
        OSError: MLflow cannot be reached.
    """
    uri, artifacts = store()
    refused = dict[str, str]()
    try:
        client = connect(uri)
        for journal in journals:
            _send_rest(journal, uri)
        number = experiment_number(client, record.experiment, artifacts)
        run_id = parent_run(client, number, record.name, record.title)
        if record.status == "RUNNING":
            client.update_run(run_id, record.status)
        else:
            client.set_terminated(run_id, record.status)
        _describe(client, run_id, record, refused)
        view_of_runs = json.dumps(record.view).replace("{run_id}", run_id)
        with noted(refused):
            send_entries(
                "view",
                [(record.name, view_of_runs)],
                lambda few: [
                    client.set_experiment_tag(number, VIEW_TAG + record.name, text) for text in few
                ],
            )
        with noted(refused):
            files = [(path.name, str(path)) for path in sorted(folder.iterdir())]
            send_entries(
                "artifact", files, lambda few: [client.log_artifact(run_id, path) for path in few]
            )
    except Exception as error:  # mlflow's errors share no base but Exception
        where = f"MLflow at {redact(uri)}"
        raise OSError(f"{where}: {reason_of(error)}; the comparison is in {folder}") from error
    for what, reason in refused.items():
        log.warning("left out of MLflow: %s: %s; it is in %s", what, reason, folder)
    view = f"{server_of(uri)}/#/experiments/{number}/runs?viewStateShareKey={quote(record.name)}"
    return Pages(
        run_page(uri, number, run_id), f"{view}&compareRunsMode=CHART&{KIND_OF_WORK}", number
    )


def compare_page(run_ids: Sequence[str], experiment: str) -> str:
    """The page on which MLflow compares runs; where no server is named, of one started here."""
    runs, experiments = (
        quote(json.dumps(v, separators=(",", ":"))) for v in (list(run_ids), [experiment])
    )
    page = f"{server_of(store()[0])}/#/compare-runs?runs={runs}&experiments={experiments}"
    return f"{page}&{KIND_OF_WORK}"


def _describe(client: Any, run_id: str, record: ParentRecord, refused: dict[str, str]) -> None:
    from mlflow.entities import Metric, RunTag

    address = f"get-artifact?path={record.image}&run_uuid={run_id}"
    tags = {
        **provenance(),
        "mlflow.runName": record.title,
        "mlflow.note.content": record.note.replace("{image}", address),
        **record.tags,
    }
    now_ms = int(time.time() * 1000)
    metrics = [(key, Metric(fit(key), value, now_ms, 0)) for key, value in record.metrics.items()]
    labels = [(key, RunTag(key, fit_value(value, TAG_LETTERS))) for key, value in tags.items()]
    with noted(refused):
        send_entries("metric", metrics, lambda few: client.log_batch(run_id, metrics=few))
    with noted(refused):
        send_entries("tag", labels, lambda few: client.log_batch(run_id, tags=few))


def _send_rest(folder: Path, uri: str) -> None:
    """Sends what MLflow has missed of a run; one that it does not take keeps no other from it."""
    try:
        replay(folder, uri)
    except (FileNotFoundError, BlockingIOError):
        return  # it failed before it began, or its own training sends it
    except Exception as error:  # mlflow's errors share no base but Exception
        log.warning("not all of %s has reached MLflow: %s", folder, reason_of(error))
