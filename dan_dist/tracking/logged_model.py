"""The best checkpoint of a run as a model in MLflow, to be loaded, served and registered."""

import base64
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from dan_dist.model.weights import Trained, load_trained
from shards.files import scratch_folder
from shards.images import encode

PACKAGE = Path(__file__).resolve().parent.parent  # dan_dist
NAME = "dan"
COPIED = ("val/accuracy", "val/loss", "val/mean_recall")  # metrics by which models are compared
# What dan_dist/tracking/served.py and what it imports need; it brings no code but the two packages.
NEEDED = ("mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "simplejpeg", "pydantic",
          "pyyaml")  # fmt: skip


def log_model(client: Any, run_id: str, path: Path) -> None:
    """Logs a checkpoint as the model of a run; once, however often it is called.

    It holds the checkpoint, of which only tensors and plain values are read, the code that reads
    it, class names (in its signature) and an example.

    Raises:
        ValueError, OSError: as `load_trained`. MLflow's errors: whatever was done stays, and the
            next call goes on from there.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    trained = load_trained(path)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    # A run that went on has another best checkpoint, and so another model.
    found = [m for m in logged if m.params.get("step") == str(trained.step)]
    if any(model.status == LoggedModelStatus.READY for model in found):
        return
    if found:  # begun, and broken off
        model = found[0]
    else:
        model = client.create_logged_model(
            experiment, NAME, run_id, params=_params(trained), model_type="classifier"
        )
    with scratch_folder() as folder:
        local = folder / NAME
        save_model(trained, local, run_id, model)
        client.log_model_artifacts(model.model_id, str(local))
    _copy_metrics(client, run_id, model.model_id, trained.step)
    outputs = client.get_run(run_id).outputs  # MLflow refuses a second entry of one
    known = [m.model_id for m in outputs.model_outputs] if outputs else []
    if model.model_id not in known:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, trained.step)])
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def save_model(trained: Trained, folder: Path, run_id: str, model: Any) -> None:
    """Writes MLflow's folder of a model."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    size = trained.image_size
    gray = encode(Image.new("RGB", (size, size), (128, 128, 128)))
    outputs = [ColSpec(DataType.double, name) for name in trained.class_names]
    mlflow.pyfunc.save_model(
        folder,
        mlflow_model=Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id,
            model_id=model.model_id, metadata={"class_names": list(trained.class_names)},
        ),
        python_model=str(PACKAGE / "tracking" / "served.py"),
        artifacts={"checkpoint": str(trained.path)},
        code_paths=[str(PACKAGE), str(PACKAGE.parent / "shards")],
        # A binary column's base64 MLflow's server decodes itself, and names no other form
        signature=ModelSignature(Schema([ColSpec(DataType.string, "image")]), Schema(outputs)),
        input_example=pd.DataFrame({"image": [base64.b64encode(gray).decode()]}),
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in NEEDED],
    )  # fmt: skip


def _params(trained: Trained) -> dict[str, str]:
    return {
        "heads": str(len(trained.network.heads)),
        "classes": ", ".join(trained.class_names),
        "image_size": str(trained.image_size),
        "step": str(trained.step),
    }


def _copy_metrics(client: Any, run_id: str, model_id: str, step: int) -> None:
    """What the run measured at the model's step, as the model's; MLflow keeps one of two equal."""
    from mlflow.entities import Metric

    inputs = client.get_run(run_id).inputs
    judged = {
        tag.value: {"dataset_name": own.dataset.name, "dataset_digest": own.dataset.digest}
        for own in (inputs.dataset_inputs if inputs else [])
        for tag in own.tags
        if tag.key == "mlflow.data.context"
    }.get("val", {})
    found = [m for key in COPIED for m in client.get_metric_history(run_id, key) if m.step == step]
    client.log_batch(
        run_id,
        metrics=[
            Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id, run_id=run_id, **judged)
            for m in found
            if m.model_id is None
        ],
    )
