"""MLflow's store: where it lies, how it is opened, what is made in it once."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.files import locked

# mlflow's own defaults wait four minutes for a server that is gone, and print when a run ends
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_STORE = "mlflow.db"
_PARENT_TAG = "dan_dist.parent"
PARENT_S = 30  # within which who claimed to make a parent has made it, if it lives


def store() -> tuple[str, str | None]:
    """MLflow's address, and the place of new artifacts in a store of ours, else None.

    MLFLOW_TRACKING_URI, or `mlflow.db` and `mlruns` in the working folder.
    """
    local = f"sqlite:///{Path(_STORE).absolute()}"
    uri = os.environ.get("MLFLOW_TRACKING_URI", local)
    return uri, Path("mlruns").absolute().as_uri() if uri == local else None


def connect(uri: str) -> Any:
    """An MlflowClient whose store is there, and has its tables."""
    mlflow = import_mlflow()
    with _one_at_a_time(uri):
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def experiment_number(client: Any, name: str, artifacts: str | None) -> str:
    """The number of the experiment of that name, made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        with suppress(MlflowException):  # another makes it at this moment
            client.create_experiment(name, artifact_location=artifacts)
        found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def parent_run(client: Any, number: str, name: str) -> str:
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


def import_mlflow() -> Any:
    """MLflow, which takes seconds to import, with its tongue and its patience shortened."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)  # logs each table that it makes
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return mlflow


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that open a new SQLite store at once would both make its tables, torn."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///") + ".lock")
    with locked(path, f"another process opens {uri}", wait=True):
        yield
