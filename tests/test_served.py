"""A run's model in MLflow's own server: what it takes, and what it answers to anything else."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc import scoring_server

from dan_dist.data.reader import Reader
from dan_dist.run import checkpoint
from dan_dist.tracking.journal_files import read_sent
from shards.format import ShardSet


def requests(image: str) -> dict[str, Any]:
    """Each of the forms in which MLflow's server takes images."""
    return {
        "dataframe_split": {"columns": ["image"], "data": [[image], [image]]},
        "dataframe_records": [{"image": image}] * 2,
        "instances": [{"image": image}] * 2,
        "inputs": {"image": [image] * 2},
        "instances, plain": [image] * 2,
        "inputs, plain": [image] * 2,
    }


@pytest.fixture(scope="module")
def model(dan_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model of a run as MLflow's server loads it."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(dan_run.parent / "mlflow.db", folder)
    run_id = checkpoint.load(dan_run / "best.pt")["run_id"] or read_sent(dan_run).run_id
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        return mlflow.pyfunc.load_model(f"runs:/{run_id}/dan")


def ask(model: Any, form: str, image: str) -> Any:
    body = json.dumps({form.split(",")[0]: requests(image)[form]})
    schema = model.metadata.get_input_schema()
    return scoring_server.invocations(body, "application/json", model, schema)


@pytest.mark.parametrize("form", requests(""))
def test_what_a_served_model_takes(form: str, model: Any, faces: ShardSet) -> None:
    """Images as base64 in each form; to text that is none, an answer that says what to send."""
    jpeg = Reader(faces.split("val"), max_bad=0).read(0).tobytes()
    found = json.loads(ask(model, form, base64.b64encode(jpeg).decode()).response)["predictions"]
    assert len(found) == 2 and np.isclose(sum(found[0].values()), 1)
    expected = model.predict(pd.DataFrame({"image": [jpeg]})).iloc[0]
    assert found[1] == pytest.approx(expected.to_dict())
    for text in ("no image", "abc", ""):  # letters of base64 among them
        with pytest.raises(
            mlflow.MlflowException, match=r'image 0: .*; expected a column "image" of'
        ):
            ask(model, form, text)
