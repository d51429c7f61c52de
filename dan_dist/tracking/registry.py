"""A run's model under a name and an alias, by which it is served: models:/NAME@champion"""

from pathlib import Path

from dan_dist.tracking.journal_files import read_sent
from dan_dist.tracking.store import connect, import_mlflow, store


def register(folder: Path, name: str, alias: str) -> str:
    """Registers the newest model of the run in `folder`; returns its address.

    Raises:
        ValueError: the run has no model in this store. MLflow's errors: it is away, or refuses.
    """
    from mlflow.entities import LoggedModelStatus

    uri, run_id = store()[0], read_sent(folder).run_id
    if run_id is None:
        raise ValueError(f"{folder} holds no run that MLflow has")
    client = connect(uri)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    ready = sorted(
        (m for m in logged if m.status == LoggedModelStatus.READY),
        key=lambda m: int(m.params["step"]),
    )
    if not ready:
        raise ValueError(f"MLflow's run {run_id} of {folder} has no model: it has not finished")
    mlflow = import_mlflow()
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    version = mlflow.register_model(f"models:/{ready[-1].model_id}", name)
    client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}@{alias}"
