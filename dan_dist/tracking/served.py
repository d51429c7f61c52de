"""The code of a model in MLflow: from image bytes to named probabilities.

MLflow runs this file where a logged model is loaded or served; nothing else imports it.
"""

import base64
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch

from dan_dist.data.augment import MEAN, STD
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.weights import load_trained
from shards.images import decode, to_jpeg

BATCH = 64
EXPECTED = (
    'expected a column "image" of image files as bytes, in JSON as base64: '
    '{"dataframe_records": [{"image": "…"}]}'
)


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A table with a column `image` of encoded face crops → a column of probabilities a class."""

    def load_context(self, context: Any) -> None:
        self.trained = load_trained(Path(context.artifacts["checkpoint"]))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        choose_arithmetic("float32")
        self.trained.network.to(self.device, torch.float32)

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """One row an image, in the order of the input.

        Raises:
            ValueError: an image cannot be read; names it by its number.
        """
        if not isinstance(model_input, pd.DataFrame) or "image" not in model_input:
            raise ValueError(EXPECTED)
        images, rows = list(model_input["image"]), []
        for start in range(0, len(images), BATCH):
            pixels = [self._pixels(k, images[k])
                      for k in range(start, min(start + BATCH, len(images)))]  # fmt: skip
            with torch.no_grad():
                batch = torch.from_numpy(np.stack(pixels)).to(self.device)
                rows.append(self.trained.network(batch).logits.softmax(dim=1).cpu().numpy())
        names = list(self.trained.class_names)
        values = np.concatenate(rows) if rows else np.empty((0, len(names)))
        return pd.DataFrame(values.astype(np.float64), columns=names)

    def _pixels(self, number: int, image: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(3, S, S) as the packer and the loader would give the network."""
        if isinstance(image, str):  # as JSON has it; of some requests MLflow decodes it
            try:
                image = base64.b64decode(image, validate=True)
            except ValueError as error:
                raise ValueError(f"image {number}: text that is no base64; {EXPECTED}") from error
        if not isinstance(image, bytes):
            raise ValueError(f"image {number}: a {type(image).__name__}; {EXPECTED}")
        try:
            jpeg, _ = to_jpeg(image, self.trained.image_size)
            values = (np.asarray(decode(jpeg)) / 255.0 - MEAN) / STD
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from error
        return values.astype(np.float32).transpose(2, 0, 1)


mlflow.models.set_model(ServedModel())
