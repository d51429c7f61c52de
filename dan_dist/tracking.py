"""The run's record in MLflow, written by rank 0; a tracker that records nothing elsewhere.

A tracking server that fails never stops training: the first failure is said once, and what could
not be sent is left out.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

log = logging.getLogger(__name__)

# mlflow's own defaults wait four minutes for a server that is gone
_BOUNDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_STORE = "mlflow.db"


class NullTracker:
    """Records nothing: for all ranks but the first, and where tracking is off."""

    run_id: str | None = None
    where = ""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def figure(self, figure: Callable[[], Figure], name: str) -> None: ...

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
        for key, value in tags.items():
            self._try(lambda k=key, v=value: self._client.set_tag(self.run_id, k, v))
        if self.uri.startswith("http"):
            self.where = self.uri
        elif not self._broken:
            self.where = f"mlflow ui --backend-store-uri {self.uri}"

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs `values` at the given optimiser step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [Metric(k, v, now_ms, step) for k, v in values.items()]
        self._try(lambda: self._client.log_batch(self.run_id, metrics=batch))

    def figure(self, figure: Callable[[], Figure], name: str) -> None:
        """Logs a figure as an image; `name` is its file name among the artifacts."""

        def send() -> None:
            drawn = figure()
            self._client.log_figure(self.run_id, drawn, name)
            plt.close(drawn)

        self._try(send)

    def artifact(self, path: Path, folder: str) -> None:
        """Copies a file among the run's artifacts."""
        self._try(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def end(self, status: str) -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        self._try(lambda: self._client.set_terminated(self.run_id, status))

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

    def _describe(self, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(k, str(v)) for k, v in params.items()]
        self._client.log_batch(self.run_id, params=rows)
        self._client.log_dict(self.run_id, dict(config), "config.yaml")

    def _try(self, task: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            task()
        except Exception as error:  # whatever mlflow and its HTTP stack raise
            self._broken = True
            reason = str(error).split("\n")[0]
            log.warning("MLflow at %s failed, going on without it: %s", self.uri, reason)


def confusion_figure(matrix: NDArray[np.int64], class_names: tuple[str, ...], title: str) -> Figure:
    """The confusion matrix: colour the share of the true class, numbers the images."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.6 * len(class_names)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    return figure


def images_figure(
    images: NDArray[np.float32], labels: NDArray[np.int64], class_names: tuple[str, ...], title: str
) -> Figure:
    """Up to 32 images (n, S, S, 3) of values in [0, 1], each under its class name."""
    count = min(len(images), 32)
    columns = min(count, 8)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 * columns, 1.6 * rows + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for k, axis in enumerate(axes.flat):
        axis.axis("off")
        if k < count:
            axis.imshow(images[k].clip(0, 1))
            axis.set_title(class_names[labels[k]], fontsize=9)
    figure.suptitle(title)
    return figure
