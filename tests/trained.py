"""Trained runs that many tests look at: trained once a session, copied where a test changes one."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import DAN, TINY
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.tracking.store import connect
from shards.format import ShardSet

STEPS = [*DAN, "optim.name=adam", "optim.lr=1e-3", "train.precision=float32"]  # tell images apart


class TrainedRun(NamedTuple):
    """A finished run, and MLflow's store beside its folder where it is tracked."""

    folder: Path
    overrides: list[str]  # of the tiny configuration
    metrics: Mapping[str, float]  # of the last evaluation


def train_run(folder: Path, shards: ShardSet, *overrides: str) -> TrainedRun:
    """Trains the tiny configuration in this process."""
    config = folder.with_suffix(".yaml")
    config.write_text(TINY.format(shards=shards.root, output=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent}/mlflow.db")
        patch.chdir(folder.parent)
        result = story.main(load_config(config, overrides))
    return TrainedRun(folder, list(overrides), result.metrics)


def copy_run(run: TrainedRun, folder: Path) -> Path:
    """Another folder with the run, and its store beside it; checkpoints are hard links."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pt") else shutil.copy2)(source, target)

    shutil.copytree(run.folder, folder, copy_function=copy)
    if (database := run.folder.parent / "mlflow.db").exists():
        shutil.copy2(database, folder.parent)
    return folder


@pytest.fixture(scope="session")
def dan_run(
    faces: ShardSet, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    """DAN with two heads, four steps at 32 px, tracked in MLflow."""
    folder = tmp_path_factory.mktemp("dan")
    shutil.copy2(empty_store, folder)
    options = [*STEPS, "tracking.enabled=true", "train.max_steps=4"]
    return train_run(folder / "run", faces, *options)


@pytest.fixture(scope="session")
def baseline_run(faces: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """The baseline, two steps at 32 px."""
    return train_run(tmp_path_factory.mktemp("baseline") / "run", faces, "train.max_steps=2")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with its tables and nothing in them, which takes seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store of the test's own, which MLflow is set to."""
    shutil.copy2(empty_store, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri
