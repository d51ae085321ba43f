"""The script that MLflow stores with a Heliostat model, and runs to load it ("models from code")."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np


class HeliostatModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Predicts with whatever `heliostat.load_model` makes of the stored folder: a batch in, an array of outputs out.

    MLflow has run this script by then, from the same place, so who loads the model trusts its code already.
    """

    def load_context(self, context: Any) -> None:
        import heliostat

        self._model = heliostat.load_model(Path(context.artifacts["model"]), trust_code=True)

    # MLflow reads the type hints: of plain `np.ndarray` it knows that the signature tells the rest.
    def predict(self, context: Any, model_input: np.ndarray) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(torch.from_numpy(np.ascontiguousarray(model_input))).numpy()


mlflow.models.set_model(HeliostatModel())
