"""The code of a model in MLflow: from image bytes to named probabilities.

MLflow runs this file where a logged model is loaded or served; nothing else imports it.
"""

import base64
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException

from dan_dist.data.augment import MEAN, STD
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.weights import load_trained
from dan_dist.run.plain import refuse_not_finite
from shards.images import decode, to_jpeg

BATCH = 64
EXPECTED = (
    'expected a column "image" of image files as bytes, in JSON as base64: '
    '{"dataframe_records": [{"image": "…"}]}'
)


class ImageError(MlflowException, ValueError):  # type: ignore[misc]
    """What was sent is no table of images; MLflow's server hands this line on, and no other's."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.error_code = "BAD_REQUEST"


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
            ImageError: an image cannot be read; names it by its number.
        """
        if not isinstance(model_input, pd.DataFrame) or "image" not in model_input:
            raise ImageError(EXPECTED)
        images, rows = list(model_input["image"]), []
        for start in range(0, len(images), BATCH):
            pixels = [self._pixels(k, images[k])
                      for k in range(start, min(start + BATCH, len(images)))]  # fmt: skip
            with torch.no_grad():
                batch = torch.from_numpy(np.stack(pixels)).to(self.device)
                logits = self.trained.network(batch).logits
                refuse_not_finite(f"images from {start} on: the output", logits)
                rows.append(logits.softmax(dim=1).cpu().numpy())
        names = list(self.trained.class_names)
        values = np.concatenate(rows) if rows else np.empty((0, len(names)))
        return pd.DataFrame(values.astype(np.float64), columns=names)

    def _pixels(self, number: int, image: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(3, S, S) as the packer and the loader would give the network."""
        if not isinstance(image, str | bytes):
            raise ImageError(f"image {number}: a {type(image).__name__}; {EXPECTED}")
        # Base64 is what JSON holds, bytes what Python gives; no image file is of its letters alone
        with suppress(ValueError):
            image = base64.b64decode(image, validate=True) or image
        content = image.encode() if isinstance(image, str) else bytes(image)
        try:
            jpeg, _ = to_jpeg(content, self.trained.image_size)
            values = (np.asarray(decode(jpeg)) / 255.0 - MEAN) / STD
        except ValueError as error:
            raise ImageError(f"image {number}: {error}; {EXPECTED}") from error
        return values.astype(np.float32).transpose(2, 0, 1)


mlflow.models.set_model(ServedModel())
