"""The run's record in MLflow, written by rank 0; a tracker that records nothing elsewhere.

Everything goes into a journal first; a thread sends it on. So training never waits for a tracking
server, and what a server missed arrives when it is back, or by

    python -m dan_dist.tracking replay RUN_FOLDER
"""

import argparse
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dan_dist.journal import Journal, forget
from dan_dist.logged_model import log_model

log = logging.getLogger(__name__)

# mlflow's own defaults wait four minutes for a server that is gone, and print when a run ends
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_STORE = "mlflow.db"
_JOURNAL_TAG, _PARENT_TAG = "dan_dist.journal", "dan_dist.parent"
_ROLLBACK_TAG = "dan_dist.rolled_back"
PARENT_S = 30  # within which who claimed to make a parent has made it, if it lives
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
DRAIN_S = 60.0  # at the end of a run, as long as the server takes what it is sent
RETRY_S = 10.0  # and in spite of failures: many runs may be opening a new store at once
SHORT_DRAIN_S = 5.0


REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # MLflow's words


class RefusedError(Exception):
    """A record that cannot be sent, now or ever."""


class NullTracker:
    """Records nothing: for all ranks but the first, and where tracking is off."""

    run_id: str | None = None  # MLflow's, for the checkpoint
    where = ""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None: ...

    def artifact(self, path: Path, folder: str) -> None: ...

    def model(self, path: Path) -> None: ...

    def end(self, status: str) -> None: ...


class MlflowTracker(NullTracker):
    """One MLflow run, opened or, where the journal in `folder` holds one, continued.

    The store is MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder.

    Raises:
        OSError: another training has `folder` open.

    run_id: of the run that is gone on with where the journal was lost. forget_after: the step
    after which what was noted is noted anew, as it was computed from damaged images.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str | None = None,
        forget_after: int | None = None,
        experiment: str,
        run_name: str | None,
        parent: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> None:
        self._journal, self._folder = Journal(folder), folder
        uri, _ = store()
        tags = {**tags, "commit": commit()}
        if not self._journal.opened:
            self._journal.append(
                "run", experiment=experiment, name=run_name, parent=parent, uri=uri,
                time_ms=_now_ms(), config=dict(config), run_id=run_id,
                params={key: str(value) for key, value in params.items()},
            )  # fmt: skip
        self._journal.append("status", status="RUNNING", tags=tags, time_ms=_now_ms())
        if forget_after is not None:
            self._journal.append("rollback", step=forget_after)
        self.where = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
        self._sender = Sender(self._journal, uri)
        self._sender.start()

    @property
    def run_id(self) -> str | None:  # type: ignore[override]
        return self._journal.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Notes `values` at the given optimiser step, unless they were noted for it before."""
        if new := self._journal.new_metrics(values, step):
            self._journal.append("metrics", values=new, step=step, time_ms=_now_ms())

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None:
        """Notes the figure `draw(*values)` as the artifact `name`."""
        path = self._folder / "figures" / name
        drawn = draw(*values)
        try:
            path.parent.mkdir(exist_ok=True)
            drawn.savefig(path)
        except OSError as error:
            log.warning("no figure %s: %s", path, error.strerror)
        else:
            self.artifact(path, "")
        plt.close(drawn)

    def artifact(self, path: Path, folder: str) -> None:
        """Notes a file to be copied among the run's artifacts as it is when it is sent."""
        relative = os.path.relpath(path, self._folder)
        self._journal.append("artifact", path=relative, folder=folder)

    def model(self, path: Path) -> None:
        """Notes a checkpoint to be logged as the run's model."""
        self._journal.append("model", path=os.path.relpath(path, self._folder))

    def end(self, status: str) -> None:
        """Ends the run (FINISHED, FAILED, KILLED) and waits while the server takes what is left.

        Only a finished run waits for long: one that was told to stop has little time.
        """
        self._journal.append("status", status=status, tags={}, time_ms=_now_ms())
        finished = status == "FINISHED"
        self._sender.drain(
            DRAIN_S if finished else SHORT_DRAIN_S, retry_s=RETRY_S if finished else 0.0
        )
        if lost := len(self._journal.unwritten):
            log.warning("%d records found no place on the disk, and are lost", lost)
        if left := len(self._journal.pending):
            log.warning(
                "%d records have not reached MLflow; when it is back: "
                "python -m dan_dist.tracking replay %s", left, self._folder,
            )  # fmt: skip
        self._journal.close()


def record_run(
    folder: Path,
    *,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    step: int,
    artifacts: Sequence[str],
) -> None:
    """A whole run at once: what was found of a network that another run has trained.

    artifacts: names of files in `folder`.
    """
    forget(folder)
    tracker = MlflowTracker(
        folder, experiment=experiment, run_name=run_name, parent=None, params=params, tags=tags,
        config=config,
    )  # fmt: skip
    tracker.metrics(metrics, step)
    for name in artifacts:
        tracker.artifact(folder / name, "")
    tracker.end("FINISHED")


class Sender(threading.Thread):
    """Sends a journal's records to MLflow in their order, each until it has arrived.

    Sending one twice does no harm: a run is found by its journal's tag, and MLflow keeps one of
    several equal metrics (same step, time and value).
    """

    def __init__(self, journal: Journal, uri: str) -> None:
        super().__init__(name="tracking", daemon=True)
        _import_mlflow()
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
        number = _experiment(
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
            tags["mlflow.parentRunId"] = _parent(self._client, number, record["parent"])
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


def store() -> tuple[str, str | None]:
    """MLflow's address, and where a new experiment's artifacts go, where that is ours to say.

    MLFLOW_TRACKING_URI, or `mlflow.db` and `mlruns` in the working folder.
    """
    local = f"sqlite:///{Path(_STORE).absolute()}"
    uri = os.environ.get("MLFLOW_TRACKING_URI", local)
    return uri, Path("mlruns").absolute().as_uri() if uri == local else None


def connect(uri: str) -> Any:
    """An MlflowClient whose store is there, and has its tables."""
    mlflow = _import_mlflow()
    with _one_at_a_time(uri):
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def publish(
    folder: Path,
    *,
    experiment: str,
    parent: str,
    note: str,
    status: str,
    journals: Sequence[Path],
) -> str:
    """Puts the files of a folder into the run that holds others, made if need be.

    note: Markdown, which MLflow shows as the run's description. status: RUNNING, FINISHED or
    FAILED. journals: folders of the runs that it holds; what MLflow has missed of them is sent
    first. Returns the experiment's number.

    Raises:
        OSError: MLflow cannot be reached.
    """
    uri, artifacts = store()
    try:
        for journal in journals:
            # Without one it failed before it began; one in use is sent by its own training.
            with suppress(FileNotFoundError, BlockingIOError):
                replay(journal, uri)
        client = connect(uri)
        number = _experiment(client, experiment, artifacts)
        run_id = _parent(client, number, parent)
        client.set_tag(run_id, "mlflow.note.content", note)
        for path in sorted(folder.iterdir()):
            client.log_artifact(run_id, str(path))
        if status == "RUNNING":
            client.update_run(run_id, status)
        else:
            client.set_terminated(run_id, status)
    except Exception as error:  # mlflow's errors share no base but Exception
        reason = str(error).split("\n")[0]
        raise OSError(f"MLflow at {uri}: {reason}; the comparison is in {folder}") from error
    return number


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The number of the experiment of that name, made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        with suppress(MlflowException):  # another makes it at this moment
            client.create_experiment(name, artifact_location=artifacts)
        found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _parent(client: Any, number: str, name: str) -> str:
    """The run that holds others, made once however many ask for it at the same moment.

    MLflow has no two experiments of one name: who can make one called so makes the run.
    """
    from mlflow.exceptions import MlflowException

    own, claim = f"tags.`{_PARENT_TAG}` = '{name}'", f"claim of {name} in {number}"
    for attempt in range(PARENT_S):
        if runs := client.search_runs([number], own):
            return str(runs[0].info.run_id)
        try:
            client.delete_experiment(client.create_experiment(claim))
            break  # deleted, it is out of sight, but its name stays taken
        except MlflowException:  # another makes it at this moment
            if attempt < PARENT_S - 1:
                time.sleep(1)
    run = client.create_run(number, tags={_PARENT_TAG: name}, run_name=name)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _import_mlflow() -> Any:
    """MLflow, which takes seconds to import, with its tongue and its patience shortened."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)  # tells of each table it makes
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return mlflow


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that open a new SQLite store at once would both make its tables, torn."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with Path(uri.removeprefix("sqlite:///") + ".lock").open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _now_ms() -> int:
    return int(time.time() * 1000)


def replay(folder: Path, uri: str | None = None) -> int:
    """Sends what a run's journal still holds; returns the number of records.

    uri: the store; by default that of MLFLOW_TRACKING_URI or `mlflow.db` in the working folder. A
    journal that names another is not followed there: it may come from elsewhere.

    Raises:
        FileNotFoundError: `folder` holds no journal. OSError: its training is still running.
        ValueError: the run was begun in another store.
    """
    if not (folder / "journal.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no journal of a run")
    journal = Journal(folder)
    count = len(journal.pending)
    if not count:
        journal.close()
        return 0
    chosen = uri or store()[0]
    if chosen != journal.uri and not (uri or "MLFLOW_TRACKING_URI" in os.environ):
        journal.close()
        raise ValueError(
            f"{folder} was begun in the store {journal.uri}; to send it there: "
            f"MLFLOW_TRACKING_URI={journal.uri} python -m dan_dist.tracking replay {folder}"
        )
    sender = Sender(journal, chosen)
    while journal.pending:
        sender.settle(journal.pending[0])
    journal.close()
    return count


def note_failure(folder: Path) -> None:
    """Says of a run whose process is gone without a word that it has failed."""
    if (folder / "journal.jsonl").is_file():
        journal = Journal(folder)
        journal.append("status", status="FAILED", tags={}, time_ms=_now_ms())
        journal.close()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dan_dist.tracking")
    parser.add_argument("command", choices=("replay",), help="send what MLflow has missed")
    parser.add_argument("folder", help="the run's folder (train.output)")
    options = parser.parse_args(arguments)
    try:
        count = replay(Path(options.folder))
    except Exception as error:  # mlflow's errors share no base but Exception
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{count} records sent")
    return 0


def commit() -> str:
    """The git commit of this code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
