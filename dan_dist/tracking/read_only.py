"""An SQLite store of MLflow's as it lies: MLflow itself would make or change its tables.

A training opens the store; whoever only asks whether that would go well reads it here.
"""

import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dan_dist.tracking.sqlite import refuse_broken, refuse_used
from dan_dist.tracking.store import check_takes, import_mlflow


class MissingError(Exception):
    """What MLflow's store answers where there is none of a number or an id."""

    error_code = "RESOURCE_DOES_NOT_EXIST"


class Reader:
    """What `store.check_takes` asks of an MlflowClient, read from the tables."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def get_experiment_by_name(self, name: str) -> Any:
        return self._experiment("name", name)

    def get_experiment(self, number: object) -> Any:
        found = self._experiment("experiment_id", number)
        if found is None:
            raise MissingError(number)
        return found

    def get_run(self, run_id: str) -> Any:
        query = "SELECT experiment_id, lifecycle_stage FROM runs WHERE run_uuid = ?"
        found = self._database.execute(query, (run_id,)).fetchone()
        if found is None:
            raise MissingError(run_id)
        number, stage = found
        return SimpleNamespace(info=SimpleNamespace(experiment_id=number, lifecycle_stage=stage))

    def _experiment(self, column: str, value: object) -> Any:
        names = ("experiment_id", "name", "lifecycle_stage")
        query = f"SELECT {', '.join(names)} FROM experiments WHERE {column} = ?"
        found = self._database.execute(query, (value,)).fetchone()
        return found and SimpleNamespace(**dict(zip(names, found, strict=True)))


def check_file(path: Path, uri: str, experiment: str, run_id: str | None) -> str:
    """Looks whether a store that is there takes a run, as `store.check_takes`; returns what it is.

    Raises:
        ClosedError: it does not, or is none, or of another MLflow. sqlite3.Error: it is away.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        try:
            found, versions = _version(database), versions_here()
            if found != versions[0]:
                if found in versions and not _tables_here() <= _tables(database):
                    return f"the training brings the tables of {path} to this MLflow's version"
                text = f"its tables have version {found}, those of this MLflow {versions[0]}"
                refuse_used(database, path, uri, text)
                return f"the training makes the tables of {path}"
            check_takes(Reader(database), experiment, run_id)
        except sqlite3.DatabaseError as error:
            refuse_broken(path, error)
            raise
    return f"{path} is there"


def _version(database: sqlite3.Connection) -> str | None:
    """The version of the tables; None where it was not noted yet."""
    if "alembic_version" not in _tables(database):
        return None
    found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(found[0]) if found else None


def _tables(database: sqlite3.Connection) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    return {name for (name,) in database.execute(query)}


def versions_here() -> list[str]:
    """The versions of the tables that the installed MLflow knows, the one that it makes first."""
    from alembic.script import ScriptDirectory  # takes seconds to import, as MLflow does

    package = find_spec("mlflow")
    assert package is not None and package.origin is not None
    scripts = Path(package.origin).parent / "store" / "db_migrations"
    return [script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()]


def _tables_here() -> set[str]:
    """Those of the installed MLflow: it completes a store that lacks one, and no other."""
    import_mlflow()
    from mlflow.store.db.utils import Base

    return set(Base.metadata.tables)
