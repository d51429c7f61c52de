"""Sends a journal's records to MLflow, each until it has arrived."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dan_dist.tracking.journal import Journal
from dan_dist.tracking.logged_model import log_model
from dan_dist.tracking.store import connect, experiment_number, import_mlflow, parent_run, store

log = logging.getLogger(__name__)

_JOURNAL_TAG, _ROLLBACK_TAG = "dan_dist.journal", "dan_dist.rolled_back"
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # MLflow's words


class RefusedError(Exception):
    """A record that cannot be sent, now or ever."""


class Sender(threading.Thread):
    """Sends a journal's records to MLflow in their order, each until it has arrived.

    Sending one twice does no harm: a run is found by its journal's tag, and MLflow keeps one of
    several equal metrics (same step, time and value).
    """

    def __init__(self, journal: Journal, uri: str) -> None:
        super().__init__(name="tracking", daemon=True)
        import_mlflow()
        self._journal, self._uri = journal, uri
        self._client: Any = None
        self._ending, self._failing = threading.Event(), False
        self._give_up_s = 0.0

    def run(self) -> None:
        delay_s = FIRST_RETRY_S
        while record := self._next():
            try:
                self.settle(record)
            except Exception as error:  # whatever mlflow and its HTTP stack raise
                if not self._failing:
                    reason = str(error).split("\n")[0]
                    log.warning("MLflow at %s failed, its journal grows: %s", self._uri, reason)
                self._failing = True
                if self._ending.wait(delay_s):
                    if time.monotonic() > self._give_up_s:
                        return
                    time.sleep(FIRST_RETRY_S)
                delay_s = min(2 * delay_s, LAST_RETRY_S)
                continue
            if self._failing:
                log.warning("MLflow at %s is back", self._uri)
            self._failing, delay_s = False, FIRST_RETRY_S

    def drain(self, timeout_s: float, *, retry_s: float) -> None:
        """Ends the thread once all is sent, at a failure after `retry_s`, or after `timeout_s`."""
        self._give_up_s = time.monotonic() + retry_s
        self._ending.set()
        with self._journal.changed:
            self._journal.changed.notify_all()
        self.join(timeout_s)

    def settle(self, record: Mapping[str, Any]) -> None:
        """Sends the first pending record, or leaves it out where no sending it will ever help."""
        from mlflow.exceptions import MlflowException

        try:
            self.deliver(record)
        except (MlflowException, RefusedError) as error:
            refused = getattr(error, "error_code", "") in REFUSALS and record["kind"] != "run"
            if not (refused or isinstance(error, RefusedError)):
                raise
            reason = str(error).split("\n")[0]
            log.warning("left out of MLflow: a record (%s): %s", record["kind"], reason)
        self._journal.acknowledge()

    def deliver(self, record: Mapping[str, Any]) -> None:
        """Sends one record."""
        from mlflow.entities import Metric, Param

        if self._client is None:
            self._client = connect(self._uri)
        client, run_id = self._client, self._journal.run_id
        match record["kind"]:
            case "run":
                run_id = self._open(record)
                params = [Param(key, value[:6000]) for key, value in record["params"].items()]
                client.log_batch(run_id, params=params)
                client.log_dict(run_id, record["config"], "config.yaml")
                self._journal.run_id = run_id
            case "metrics":
                rows = [
                    Metric(key, value, record["time_ms"], record["step"])
                    for key, value in record["values"].items()
                ]
                client.log_batch(run_id, metrics=rows)
            case "artifact":
                client.log_artifact(
                    run_id, str(self._own(record["path"])), record["folder"] or None
                )
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
                for key, value in record["tags"].items():
                    client.set_tag(run_id, key, value)
                if record["status"] == "RUNNING":
                    client.update_run(run_id, "RUNNING")
                else:
                    client.set_terminated(run_id, record["status"], record["time_ms"])

    def _open(self, record: Mapping[str, Any]) -> str:
        """The run of this journal: the one with its tag, the one it goes on with, or a new one."""
        local, artifacts = store()  # not the journal's: that may come from elsewhere
        number = experiment_number(
            self._client, record["experiment"], artifacts if self._uri == local else None
        )
        own = f"tags.`{_JOURNAL_TAG}` = '{self._journal.id}'"
        if former := record.get("run_id"):
            own = f"attributes.run_id = '{former}'"
        runs = self._client.search_runs([number], own, order_by=["attributes.start_time ASC"])
        if runs:
            return str(runs[0].info.run_id)
        tags = {_JOURNAL_TAG: self._journal.id}
        if record["parent"]:
            tags["mlflow.parentRunId"] = parent_run(self._client, number, record["parent"])
        run = self._client.create_run(number, record["time_ms"], tags, record["name"])
        return str(run.info.run_id)

    def _own(self, name: str) -> Path:
        """A file of the run's folder, and of no other: a journal may come from elsewhere.

        Raises:
            RefusedError: it lies elsewhere, or is gone.
        """
        folder = self._journal.folder.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise RefusedError(f"{name} lies outside {folder}")
        if not path.is_file():
            raise RefusedError(f"{path} is not there any more")
        return path

    def _next(self) -> dict[str, Any] | None:
        """The first record that was not delivered; None once the journal ends."""
        with self._journal.changed:
            while not self._journal.pending:
                if self._ending.is_set():
                    return None
                self._journal.changed.wait()
            return self._journal.pending[0]
