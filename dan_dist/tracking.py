"""The run's record in MLflow, written by rank 0; a tracker that records nothing elsewhere.

A tracking server that fails never stops training: the first failure is said once, and what could
not be sent is left out.
"""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data import MEAN, STD

log = logging.getLogger(__name__)

# mlflow's own defaults wait four minutes for a server that is gone
_BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_STORE = "mlflow.db"


class NullTracker:
    """Records nothing: for all ranks but the first, and where tracking is off."""

    run_id: str | None = None  # MLflow's, for the checkpoint
    where = ""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None: ...

    def artifact(self, path: Path, folder: str) -> None: ...

    def end(self, status: str) -> None: ...


class MlflowTracker(NullTracker):
    """One MLflow run, opened or, given `run_id`, continued.

    The store is MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder.
    """

    def __init__(
        self,
        *,
        experiment: str,
        run_name: str | None,
        run_id: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> None:
        for name, value in _BOUNDS.items():
            os.environ.setdefault(name, value)
        import mlflow  # seconds to import, and only here

        logging.getLogger("alembic").setLevel(logging.WARNING)  # tells of each table it makes
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._broken = False
        local = f"sqlite:///{Path(_STORE).absolute()}"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        artifacts = Path("mlruns").absolute().as_uri() if self.uri == local else None
        self._client = mlflow.MlflowClient(self.uri)
        self._try(lambda: self._open(experiment, run_name, run_id, artifacts))
        if self.run_id and not run_id:
            self._try(lambda: self._describe(params, config))
        for key, value in {**tags, "commit": commit()}.items():
            self._try(partial(self._tag, key, value))
        if self.uri.startswith("http"):
            self.where = self.uri
        elif not self._broken:
            self.where = f"mlflow ui --backend-store-uri {self.uri}"

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs `values` at the given optimiser step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [Metric(k, v, now_ms, step) for k, v in values.items()]
        self._try(lambda: self._client.log_batch(self._run, metrics=batch))

    def figure(self, name: str, draw: Callable[..., Figure], *values: Any) -> None:
        """Logs the figure `draw(*values)` as the artifact `name`."""

        def send() -> None:
            drawn = draw(*values)
            self._client.log_figure(self._run, drawn, name)
            plt.close(drawn)

        self._try(send)

    def artifact(self, path: Path, folder: str) -> None:
        """Copies a file among the run's artifacts."""
        self._try(lambda: self._client.log_artifact(self._run, str(path), folder))

    def end(self, status: str) -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        self._try(lambda: self._client.set_terminated(self._run, status))

    def _open(
        self, experiment: str, run_name: str | None, run_id: str | None, artifacts: str | None
    ) -> None:
        if run_id:
            self._client.set_terminated(run_id, "RUNNING")
            self.run_id = run_id
            return
        found = self._client.get_experiment_by_name(experiment)
        number = (
            found.experiment_id
            if found
            else self._client.create_experiment(experiment, artifact_location=artifacts)
        )
        self.run_id = self._client.create_run(number, run_name=run_name).info.run_id

    @property
    def _run(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _tag(self, key: str, value: str) -> None:
        self._client.set_tag(self._run, key, value)

    def _describe(self, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(k, str(v)) for k, v in params.items()]
        self._client.log_batch(self._run, params=rows)
        self._client.log_dict(self._run, dict(config), "config.yaml")

    def _try(self, task: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            task()
        except Exception as error:  # whatever mlflow and its HTTP stack raise
            self._broken = True
            reason = str(error).split("\n")[0]
            log.warning("MLflow at %s failed, going on without it: %s", self.uri, reason)


def commit() -> str:
    """The git commit of this code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def confusion_figure(matrix: NDArray[np.int64], class_names: tuple[str, ...]) -> Figure:
    """The validation confusion matrix: colour is the share of the true class, text the images."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.6 * len(class_names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    accuracy = matrix.trace() / matrix.sum()
    axes.set(xlabel="predicted", ylabel="true", title=f"Validation, accuracy {accuracy:.2%}")
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    return figure


def images_figure(images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Figure:
    """Up to 32 training images (n, 3, S, S) as the network sees them, under their class names."""
    count = min(len(images), 32)
    columns = min(count, 8)
    rows = -(-count // columns)
    pixels = images[:count].permute(0, 2, 3, 1).float().cpu().numpy() * STD + MEAN
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 * columns, 1.6 * rows + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for k, axis in enumerate(axes.flat):
        axis.axis("off")
        if k < count:
            axis.imshow(pixels[k].clip(0, 1))
            axis.set_title(class_names[int(labels[k])], fontsize=9)
    figure.suptitle("Training images, augmented")
    return figure
