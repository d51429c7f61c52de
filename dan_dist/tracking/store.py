"""MLflow's store: where it lies, how it is opened, what is made in it once."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from dan_dist.redaction import redact
from dan_dist.tracking.faults import ClosedError, is_refusal, reason_of
from dan_dist.tracking.sqlite import database, mend, opening

# mlflow's own defaults wait four minutes for a server that is gone, and print when a run ends
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_STORE = "mlflow.db"
_PARENT_TAG = "dan_dist.parent"
LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` serves a store that is a file
KIND_OF_WORK = "workflowType=machine_learning"
BY_NUMBER = "id:"  # before an experiment's number, in place of its name
PARENT_S = 30  # within which who claimed to make a parent has made it, if it lives


def store() -> tuple[str, str | None]:
    """MLflow's address, and the place of new artifacts in a store of ours, else None.

    MLFLOW_TRACKING_URI, or `mlflow.db` and `mlruns` in the working folder.
    """
    local = f"sqlite:///{Path(_STORE).absolute()}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or local
    return uri, Path("mlruns").absolute().as_uri() if uri == local else None


def page(uri: str) -> str:
    """Where people look at a store, without secrets: a server's address or a command."""
    shown = redact(uri)
    return shown if shown.startswith("http") else f"mlflow ui --backend-store-uri {shown}"


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page, on a server that is started here where none is named.

    Without the kind of work, MLflow 3 would open its pages for language models.
    """
    return f"{server_of(uri)}/#/experiments/{experiment_id}/runs/{run_id}?{KIND_OF_WORK}"


def server_of(uri: str) -> str:
    """The address of a store's pages, without secrets; a file's are served here."""
    return redact(uri).rstrip("/") if uri.startswith("http") else LOCAL


def connect(uri: str) -> Any:
    """An MlflowClient whose store is there, and has its tables.

    Raises:
        ClosedError: this MLflow refuses the store. Others: it is away.
    """
    with opening(uri):
        try:
            return _connect(uri)
        except Exception as error:  # mlflow's errors and SQLAlchemy's share no base but Exception
            if mend(uri, error):
                return _connect(uri)
            if is_refusal(error):
                raise ClosedError(f"MLflow cannot use {redact(uri)}: {reason_of(error)}") from error
            raise


def _connect(uri: str) -> Any:
    client = import_mlflow().MlflowClient(uri)
    try:
        client.search_experiments(max_results=1)
    except Exception as error:
        if not is_refusal(error) or not uri.startswith("http"):
            raise
        client.get_experiment_by_name("Default")  # as servers of MLflow 1 know it too
    return client


def experiment_number(client: Any, name: str, artifacts: str | None) -> str:
    """The number of the experiment of that name, made if need be; or of one by its number.

    Raises:
        ClosedError: it was deleted, or there is none of that number.
    """
    from mlflow.exceptions import MlflowException

    if name.startswith(BY_NUMBER):
        return _numbered(client, name)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:  # where it is not that another makes it at this moment
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
    check_active(found)
    return str(found.experiment_id)


def _numbered(client: Any, name: str) -> str:
    """The number in `id:NUMBER`, where there is such an experiment."""
    number = name.removeprefix(BY_NUMBER)
    try:
        found = client.get_experiment(number)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise ClosedError(
                f"MLflow has no experiment {number}, which tracking.experiment or "
                "MLFLOW_EXPERIMENT_ID names"
            ) from error
        raise
    check_active(found)
    return str(found.experiment_id)


def is_new(uri: str) -> bool:
    """Whether a store is a file that is not there yet: the first run makes it."""
    path = database(uri)
    return path is not None and not (path.is_file() and path.stat().st_size)


def check_new(uri: str, experiment: str, run_id: str | None = None) -> None:
    """Refuses what a store that is made by this run cannot hold; only experiment 0 is in each.

    run_id: of a run that somebody else has made for this one.

    Raises:
        ClosedError: names what is not there, and the store.
    """
    missing = ""
    if run_id is not None:
        missing = f"run {run_id}, which MLFLOW_RUN_ID names"
    elif experiment.startswith(BY_NUMBER) and experiment != f"{BY_NUMBER}0":
        number = experiment.removeprefix(BY_NUMBER)
        missing = f"experiment {number}, which tracking.experiment or MLFLOW_EXPERIMENT_ID names"
    if missing:
        raise ClosedError(f"MLflow has no {missing}: its store {redact(uri)} is not there yet; "
                          "MLFLOW_TRACKING_URI names another")  # fmt: skip


def check_active(experiment: Any) -> None:
    """Refuses an experiment that was deleted: its name stays taken, and it takes no run."""
    if experiment.lifecycle_stage == "deleted":
        raise ClosedError(
            f"MLflow's experiment '{experiment.name}' was deleted; restore it: mlflow experiments "
            f"restore -x {experiment.experiment_id}, or give another name: tracking.experiment=NAME"
        )


def check_takes(client: Any, experiment: str, run_id: str | None = None) -> None:
    """Looks whether a store takes a new run of that experiment, or records of a run that is there.

    Raises:
        ClosedError: it does not.
    """
    if run_id is not None:
        active_run(client, run_id)
        return
    if experiment.startswith(BY_NUMBER):
        _numbered(client, experiment)
        return
    try:
        found = client.get_experiment_by_name(experiment)
    except Exception as error:
        if is_refusal(error):
            return  # a server that cannot look it up may take the run all the same
        raise
    if found is not None:
        check_active(found)


def active_run(client: Any, run_id: str) -> Any:
    """The run of that id.

    Raises:
        ClosedError: it was deleted, or is not there. Others: the server is away.
    """
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise ClosedError(f"MLflow has no run {run_id}") from error
        raise
    if run.info.lifecycle_stage == "deleted":
        raise ClosedError(
            f"MLflow's run {run_id} was deleted; restore it: mlflow runs restore --run-id {run_id}"
        )
    check_active(client.get_experiment(run.info.experiment_id))
    return run


def parent_run(client: Any, number: str, name: str, title: str | None = None) -> str:
    """The run that holds others, made once however many ask for it at the same moment.

    title: what people see of it; by default its name.

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
    run = client.create_run(number, tags={_PARENT_TAG: name}, run_name=title or name)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def import_mlflow() -> Any:
    """MLflow, which takes seconds to import, with its tongue and its patience shortened."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)  # logs each table that it makes
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # traces; they are raised
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return mlflow
