"""The run's record in MLflow, written by rank 0; a tracker that records nothing elsewhere.

Everything goes into a journal first; threads send it on. So training never waits for a tracking
server, and records that a server missed arrive when it is back, or by

    python -m dan_dist.tracking replay RUN_FOLDER
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from matplotlib.figure import Figure

from dan_dist.redaction import redact, redact_tree
from dan_dist.tracking.figures import save
from dan_dist.tracking.inputs import ModelInput
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import SYSTEM, LeftOut, remove_journal
from dan_dist.tracking.names import check_written
from dan_dist.tracking.provenance import provenance
from dan_dist.tracking.sender import Sender, ask, waiting
from dan_dist.tracking.store import (
    check_new,
    check_takes,
    connect,
    is_new,
    page,
    run_page,
    store,
)

log = logging.getLogger(__name__)

DRAIN_S = 60.0  # at the end of a run, as long as the server takes what it is sent
RETRY_S = 10.0  # and in spite of failures: many runs may be opening a new store at once
SHORT_DRAIN_S = 5.0
CHECK_S = 10.0  # within which a server, if it is there, can refuse the run before training


@dataclass(frozen=True)
class RunRecord:
    """What MLflow holds of a run from its start."""

    experiment: str
    name: str
    params: Mapping[str, Any]
    config: Mapping[str, Any]  # the artifact config.yaml
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None  # the name of a run that holds this one and others
    parent_title: str | None = None  # what people see of it; by default its name
    datasets: Sequence[Mapping[str, Any]] = ()  # see `inputs.dataset_inputs`
    model: ModelInput | None = None  # what an evaluation judges
    adopted: str | None = None  # the id of a run that somebody else has made for this one
    step: int = 0  # after which the run resumes


class NullTracker:
    """Records nothing: for all ranks but the first, and where tracking is off."""

    run_id: str | None = None  # MLflow's, for the checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def system(self, values: Mapping[str, float]) -> None: ...

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None: ...

    def artifact(self, path: Path, folder: str) -> None: ...

    def conclude(self, status: str, model: Path | None = None) -> None: ...


class MlflowTracker(NullTracker):
    """One MLflow run, opened or, where the journal in `folder` holds one, continued.

    The store is MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder. As a context, the run
    ends with the block: as `conclude` sets, or as failed.

    run_id: of the run that is continued where the journal was lost. rollback_to: the step after
    which records do not stand, as they were computed from damaged images.

    Raises:
        OSError: another training has `folder` open.
        ValueError: MLflow will not take the run, now or later; a server that is away may.
    """

    def __init__(
        self,
        folder: Path,
        record: RunRecord,
        *,
        run_id: str | None = None,
        rollback_to: int | None = None,
    ) -> None:
        check_written(record.experiment, dict.fromkeys(record.tags, ""))  # values may be the data's
        self._journal, self._folder = Journal(folder), folder
        sampled = [s for key, s in self._journal.last_step.items() if key.startswith(SYSTEM)]
        self._samples = max(sampled, default=0)
        self._held, self._holding = deque[dict[str, Any]](), threading.Lock()
        self._status = "FAILED"
        self._model: Path | None = None
        uri, _ = store()
        self._sender = Sender(self._journal, uri, experiment=record.experiment)
        adopted = None if run_id else record.adopted
        try:
            self._check(record.experiment, adopted, uri)
        except ValueError:
            self._journal.close()
            raise
        self._begin(record, run_id, adopted, uri)
        tags = {**record.tags, **provenance()}
        self._journal.append("status", status="RUNNING", tags=tags, time_ms=_now_ms())
        model = None if record.model is None else [*record.model]
        inputs = redact_tree({"datasets": [*record.datasets], "model": model})
        if (record.datasets or record.model) and inputs != self._journal.inputs:
            self._journal.append("inputs", **inputs)
        if rollback_to is not None:
            self._journal.append("rollback", step=rollback_to)
        self._uri = uri
        self._sender.start()

    def _begin(self, record: RunRecord, run_id: str | None, adopted: str | None, uri: str) -> None:
        """Records the run, or what of its configuration has changed since it was."""
        params = redact_tree({key: str(value) for key, value in record.params.items()})
        config, former = redact_tree(dict(record.config)), self._journal.configured()
        if not self._journal.opened:
            self._journal.append(
                "run", experiment=record.experiment, name=record.name, parent=record.parent,
                parent_title=record.parent_title, uri=uri, time_ms=_now_ms(), config=config,
                run_id=run_id, adopted=adopted, params=params,
            )  # fmt: skip
        elif former is not None and config != former.config:
            changed = {k: v for k, v in params.items() if former.params.get(k) != v}
            self._journal.append("config", config=config, changed=changed, step=record.step)

    def _check(self, experiment: str, adopted: str | None, uri: str) -> None:
        """Refuses before training what MLflow would refuse after it.

        Raises:
            ValueError: the experiment or the run was deleted, or MLflow cannot use the store.
        """
        begun = self._journal.begun
        adopted = begun.get("adopted") if begun else adopted
        if not is_new(uri):
            self._sender.check(experiment, adopted, within_s=CHECK_S)
        elif self._journal.run_id is None:  # else the store was there, and may be moved back
            ask(lambda: check_new(uri, experiment, adopted), CHECK_S)

    @property
    def run_id(self) -> str | None:  # type: ignore[override]
        return self._journal.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Records `values` at the given optimiser step, unless they were recorded for it before."""
        if new := self._journal.new_metrics(values, step):
            self._journal.append("metrics", values=new, step=step, time_ms=_now_ms())
            self._release()

    def system(self, values: Mapping[str, float]) -> None:
        """Records a sample of a node's load, with the next record; may be called by any thread.

        Those before the run's first metric wait for it: on the first one, MLflow's pages open.
        """
        with self._holding:
            self._samples += 1
            self._held.append({"values": dict(values), "step": self._samples, "time_ms": _now_ms()})
        if not all(key.startswith(SYSTEM) for key in list(self._journal.last_step)):
            self._release()

    def _release(self) -> None:
        with self._holding:
            while self._held:
                self._journal.append_later("metrics", **self._held.popleft())

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None:
        """Records the figure `draw(*values)` as the artifact `name`."""
        path = self._folder / "figures" / name
        drawn = draw(*values)
        try:
            path.parent.mkdir(exist_ok=True)
            save(drawn, path)
        except OSError as error:
            log.warning("no figure %s: %s", path, error.strerror)
        else:
            self.artifact(path, "")

    def artifact(self, path: Path, folder: str) -> None:
        """Records a file to be copied among the run's artifacts as it is when it is sent."""
        relative = os.path.relpath(path, self._folder)
        self._journal.append("artifact", path=relative, folder=folder)

    def conclude(self, status: str, model: Path | None = None) -> None:
        """How the run ends with the block: FINISHED, FAILED or KILLED.

        model: a checkpoint that becomes the run's model.
        """
        self._status, self._model = status, model

    def __exit__(self, kind: object = None, *_: object) -> None:
        """Ends the run and waits while the server takes the records that are left.

        Only a finished run waits for long: one that got a stop signal has little time. Whatever
        becomes of the model, the run has ended.
        """
        self._release()
        self._journal.append("status", status=self._status, tags={}, time_ms=_now_ms())
        if self._model is not None:
            self._journal.append("model", path=os.path.relpath(self._model, self._folder))
        finished = self._status == "FINISHED"
        self._sender.drain(
            DRAIN_S if finished else SHORT_DRAIN_S, retry_s=RETRY_S if finished else 0.0
        )
        if lost := len(self._journal.unwritten):
            log.warning("%d records found no place on the disk, and are lost", lost)
        if left := len(self._journal.pending):
            log.warning(
                "%d records have not reached MLflow (%s); when it is back: "
                "python -m dan_dist.tracking replay %s",
                left, self._sender.closed or waiting(self._journal), self._folder,
            )  # fmt: skip
        if count := len(self._journal.left_out):
            log.warning(
                "left out of MLflow, which refused it, in all: %d; to see it and try again: "
                "python -m dan_dist.tracking replay %s", count, self._folder,
            )  # fmt: skip
        if kind is None:
            self._show()
        self._journal.close()

    def _show(self) -> None:
        """The last lines of a run: where people look at it."""
        number, run_id = self._journal.experiment_id, self.run_id
        if number is None or run_id is None or self._sender.closed is not None:
            return
        if not self._uri.startswith("http"):
            log.info("to look at it: %s", page(self._uri))
        log.info("look at the run: %s", run_page(self._uri, number, run_id))


def check_recorded(experiment: str, run_name: str | None = None) -> None:
    """Looks whether a run of that experiment will be recorded, before anything is computed.

    Raises:
        ValueError: it will not be, now or later; a server that is away may take it.
    """
    check_written(experiment, {}, run_name)
    uri = store()[0]
    if is_new(uri):
        ask(lambda: check_new(uri, experiment), CHECK_S)
    else:
        ask(lambda: check_takes(connect(uri), experiment), CHECK_S)


def record_run(
    folder: Path,
    record: RunRecord,
    *,
    metrics: Mapping[str, float],
    step: int,
    artifacts: Sequence[str],
) -> None:
    """A whole run at once: what was found of a network that another run has trained.

    artifacts: names of files in `folder`. Where MLflow will not take it, a line of the log gives
    the reason; the files are there.
    """
    remove_journal(folder)
    try:
        tracker = MlflowTracker(folder, record)
    except ValueError as error:
        log.warning("not recorded in MLflow: %s", error)
        return
    with tracker:
        tracker.metrics(metrics, step)
        for name in artifacts:
            tracker.artifact(folder / name, "")
        tracker.conclude("FINISHED")


def _now_ms() -> int:
    return int(time.time() * 1000)


def replay(folder: Path, uri: str | None = None) -> tuple[int, list[LeftOut]]:
    """Sends what a run's journal still holds, and tries again what was left out.

    Returns how many records have arrived, and what MLflow still refuses.

    uri: the store; by default that of MLFLOW_TRACKING_URI or `mlflow.db` in the working folder. A
    journal that names another is not followed there: it may come from elsewhere.

    Raises:
        FileNotFoundError: `folder` holds no journal. OSError: its training is still running.
        ValueError: the run was begun in another store.
    """
    if not (folder / "journal.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no journal of a run")
    journal = Journal(folder)
    try:
        if not journal.pending and not journal.left_out:
            return 0, []
        chosen = uri or store()[0]
        if redact(chosen) != journal.uri and not (uri or "MLFLOW_TRACKING_URI" in os.environ):
            raise ValueError(
                f"{folder} was begun in the store {journal.uri}; to send it there: "
                f"MLFLOW_TRACKING_URI={journal.uri} python -m dan_dist.tracking replay {folder}"
            )
        return Sender(journal, chosen).send_all(), sorted(journal.left_out)
    finally:
        journal.close()


def record_failure(folder: Path) -> None:
    """Records the failure of a run whose process was killed before it could."""
    if (folder / "journal.jsonl").is_file():
        journal = Journal(folder)
        try:
            if journal.opened:  # else there is no run that has failed
                journal.append("status", status="FAILED", tags={}, time_ms=_now_ms())
        finally:
            journal.close()
