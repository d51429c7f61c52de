"""How each kind of a journal's records gets into MLflow."""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dan_dist.redaction import redact
from dan_dist.tracking.faults import (
    ClosedError,
    PartlyRefusedError,
    RefusedError,
    is_refusal,
    noted,
    reason_of,
    send_entries,
)
from dan_dist.tracking.inputs import find_model, linked, log_inputs
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import JOURNAL_TAG, NAME, Lane
from dan_dist.tracking.logged_model import log_model
from dan_dist.tracking.names import (
    MOST_LETTERS,
    PARAM_LETTERS,
    TAG_LETTERS,
    fit,
    fit_value,
    originals,
)
from dan_dist.tracking.store import (
    active_run,
    check_takes,
    connect,
    experiment_number,
    parent_run,
    store,
)

log = logging.getLogger(__name__)

_ROLLBACK_TAG = "dan_dist.rolled_back"


class Delivery:
    """Sends single records of a journal to the store at `uri`, in the run that is the journal's.

    Sending one twice does no harm: a run is found by its journal's tag, and MLflow keeps one of
    several equal metrics (same step, time and value).
    """

    def __init__(self, journal: Journal, uri: str, *, experiment: str | None = None) -> None:
        self._journal, self._uri, self._experiment = journal, uri, experiment
        self._client: Any = None
        self._connecting = threading.Lock()
        self._known: set[str] = set()  # names that were made fit, and whose original was recorded
        self._changed: set[str] = set()  # entries whose value was made fit, as the log has told

    @property
    def client(self) -> Any:
        """MLflow's client, connected at the first call.

        Raises:
            ClosedError: this MLflow refuses the store. Others: it is away.
        """
        with self._connecting:
            if self._client is None:
                self._client = connect(self._uri)
            return self._client

    def check(self, experiment: str, adopted: str | None) -> None:
        """Looks whether a run can be recorded at all, before it is.

        adopted: the id of a run that somebody else has made for this one.

        Raises:
            ClosedError: it cannot, now or later. Others: the store is away.
        """
        check_takes(self.client, experiment, self._journal.run_id or adopted)

    def check_refusal(self, record: Mapping[str, Any], error: Exception) -> None:
        """Looks whether what refuses a record takes others.

        Raises:
            ClosedError: it takes none. Others: it is away, or no MLflow answers there.
        """
        run_id = self._journal.run_id
        if record["kind"] == "run" and run_id is None:
            raise ClosedError(reason_of(error)) from error
        assert run_id is not None
        try:
            active_run(self.client, run_id)
        except ClosedError:
            raise
        except Exception as other:
            if is_refusal(other):  # a proxy before a server that is away, say
                raise ConnectionError(reason_of(other)) from other
            raise

    def deliver(self, record: Mapping[str, Any], lane: Lane = "records") -> None:
        """Sends what of a record belongs to a lane.

        Raises:
            RefusedError: it is of no use to send it again. ClosedError, others: as above.
        """
        run_id, client = self._journal.run_id, self.client
        match record["kind"]:
            case "run" if lane == "records":
                run_id = self._journal.run_id = self._open(record)
                self._parameters(run_id, record["params"])
            case "config" if lane == "records":
                assert run_id is not None
                self._changes(run_id, record)
            case "run" | "config":
                client.log_dict(run_id, record["config"], "config.yaml")
            case "inputs":
                assert run_id is not None
                log_inputs(client, run_id, record, redact(self._uri))
            case "metrics":
                assert run_id is not None
                self._metrics(run_id, record)
            case "artifact":
                path = self._own(record["path"])
                client.log_artifact(run_id, str(path), record["folder"] or None)
            case "model":
                path = self._own(record["path"])
                assert run_id is not None
                try:
                    log_model(client, run_id, path)
                except ValueError as error:  # a damaged checkpoint will not mend
                    raise RefusedError(str(error)) from error
            case "rollback":
                client.set_tag(run_id, _ROLLBACK_TAG, f"to step {record['step']}, after damage")
            case "status":
                assert run_id is not None
                self._status(run_id, record)

    def _status(self, run_id: str, record: Mapping[str, Any]) -> None:
        """The status first: it is taken whatever becomes of a tag."""
        if self._journal.experiment_id is None:  # a run that an earlier version has begun
            self._journal.experiment_id = self.client.get_run(run_id).info.experiment_id
        if record["status"] == "RUNNING":
            self.client.update_run(run_id, "RUNNING")
        else:
            self.client.set_terminated(run_id, record["status"], record["time_ms"])
        self._tags(run_id, record["tags"])

    def _metrics(self, run_id: str, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        time_ms, step, values = record["time_ms"], record["step"], record["values"]
        link = self._link(run_id)
        rows = [
            (key, Metric(fit(key), value, time_ms, step, **link)) for key, value in values.items()
        ]
        with self._names_kept(run_id, values):
            send_entries("metric", rows, lambda few: self.client.log_batch(run_id, metrics=few))

    def _link(self, run_id: str) -> dict[str, str]:
        """The model and the data set that an evaluation's metrics are of; of a training, none."""
        inputs = self._journal.inputs
        _, model = find_model(self.client, inputs.get("model"), redact(self._uri))
        return {} if model is None else {"model_id": model, "run_id": run_id, **linked(inputs)}

    def _parameters(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        texts = self._fitted("parameter", values, PARAM_LETTERS)
        rows = [(k, Param(fit(k), text)) for k, text in texts.items()]
        with self._names_kept(run_id, values):
            send_entries("parameter", rows, lambda few: self.client.log_batch(run_id, params=few))

    def _changes(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Parameters keep in MLflow what they were at first: tags of their names tell the rest."""
        configured = self._journal.configured()
        assert configured is not None
        changed = {k: v for k, v in configured.changed.items() if k in record["changed"]}
        with self._names_kept(run_id, record["changed"]):
            self._tags(run_id, changed)

    @contextmanager
    def _names_kept(self, run_id: str, names: Iterable[str]) -> Iterator[None]:
        """Records the original of each name that is not fit, once, before what is sent inside.

        Raises:
            PartlyRefusedError: of the originals or of the entries; neither holds the other back.
        """
        changed = {name: fit(name) for name in names if name not in self._known}
        refused = dict[str, str]()
        with noted(refused):
            self._tags(run_id, originals(changed))
        with noted(refused):
            yield
        self._known |= changed.keys()
        if refused:
            raise PartlyRefusedError(refused)

    def _tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        texts = self._fitted("tag", tags, TAG_LETTERS)
        rows = [(k, RunTag(fit(k), text)) for k, text in texts.items()]
        send_entries("tag", rows, lambda few: self.client.log_batch(run_id, tags=few))

    def _fitted(self, kind: str, values: Mapping[str, str], most: int) -> dict[str, str]:
        """Values as MLflow takes them; the log names once those that it does not take whole."""
        found = {key: fit_value(text, most) for key, text in values.items()}
        for key in values:
            if found[key] != values[key] and (what := f"{kind} {key}") not in self._changed:
                self._changed.add(what)
                log.warning("%s: cut to the %d letters of UTF-8 that MLflow takes, without NUL; "
                            "whole in %s", what, most,
                            "config.yaml" if kind == "parameter" else NAME)  # fmt: skip
        return found

    def _open(self, record: Mapping[str, Any]) -> str:
        """The run of this journal: the one with its tag, the one it goes on with, or a new one."""
        if adopted := record.get("adopted"):
            self._journal.experiment_id = active_run(self.client, adopted).info.experiment_id
            self.client.set_tag(adopted, JOURNAL_TAG, self._journal.id)
            return str(adopted)
        local, artifacts = store()  # not the journal's: that may come from elsewhere
        experiment = self._experiment or record["experiment"]
        number = experiment_number(
            self.client, experiment, artifacts if self._uri == local else None
        )
        if former := record.get("run_id"):
            with suppress(ClosedError):  # in another store, or deleted
                found = active_run(self.client, former).info
                self._journal.experiment_id = found.experiment_id
                return str(found.run_id)
        self._journal.experiment_id = number
        own = f"tags.`{JOURNAL_TAG}` = '{self._journal.id}'"
        runs = self.client.search_runs([number], own, order_by=["attributes.start_time ASC"])
        if runs:
            return str(runs[0].info.run_id)
        tags = {JOURNAL_TAG: self._journal.id}
        if record["parent"]:
            tags["mlflow.parentRunId"] = parent_run(
                self.client, number, record["parent"], record.get("parent_title")
            )
        name = self._fitted("name", {"of the run": record["name"]}, MOST_LETTERS)["of the run"]
        run = self.client.create_run(number, record["time_ms"], tags, name)
        return str(run.info.run_id)

    def _own(self, name: str) -> Path:
        """A file of the run's folder, and of no other: a journal may come from elsewhere.

        Raises:
            RefusedError: it lies elsewhere, is gone, or cannot be read.
        """
        folder = self._journal.folder.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise RefusedError(f"{name} lies outside {folder}")
        if not path.is_file():
            raise RefusedError(f"{path} is not there any more")
        try:
            path.open("rb").close()
        except PermissionError as error:
            raise RefusedError(f"{path} cannot be read: {error.strerror}") from error
        return path
