"""The run's record in MLflow, written by rank 0; a tracker that records nothing elsewhere.

Everything goes into a journal first; a thread sends it on. So training never waits for a tracking
server, and what a server missed arrives when it is back, or by

    python -m dan_dist.tracking replay RUN_FOLDER
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dan_dist.journal import Journal, forget
from dan_dist.sender import Sender
from dan_dist.store import connect, experiment_number, parent_run, store

log = logging.getLogger(__name__)

DRAIN_S = 60.0  # at the end of a run, as long as the server takes what it is sent
RETRY_S = 10.0  # and in spite of failures: many runs may be opening a new store at once
SHORT_DRAIN_S = 5.0


class NullTracker:
    """Records nothing: for all ranks but the first, and where tracking is off."""

    run_id: str | None = None  # MLflow's, for the checkpoint
    where = ""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None: ...

    def artifact(self, path: Path, folder: str) -> None: ...

    def end(self, status: str, model: Path | None = None) -> None: ...


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

    def end(self, status: str, model: Path | None = None) -> None:
        """Ends the run (FINISHED, FAILED, KILLED) and waits while the server takes what is left.

        model: a checkpoint that becomes the run's model; whatever becomes of it, the run has ended.
        Only a finished run waits for long: one that was told to stop has little time.
        """
        self._journal.append("status", status=status, tags={}, time_ms=_now_ms())
        if model is not None:
            self._journal.append("model", path=os.path.relpath(model, self._folder))
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
        number = experiment_number(client, experiment, artifacts)
        run_id = parent_run(client, number, parent)
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
