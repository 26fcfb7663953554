"""The code of a checkpoint's LoggedModel: it answers a service's requests with the checkpoint beside it.

MLflow runs this file where a model is served or loaded with MLflow itself. `metateleport.load` never does: it reads the
checkpoint's weights and card alone.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class AnsweringModel(PythonModel):
    """Answers requests of schema 1: a column `request` with a JSON text in each row, as `POST /v1/ASK` takes it."""

    def load_context(self, context: Any) -> None:
        """Loads the checkpoint."""
        from metateleport.checkpoint import load_checkpoint
        from metateleport.service import Answerer

        self.answerer = Answerer(load_checkpoint(context.artifacts["checkpoint"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """An answer, or what is wrong with the request, for each row."""
        # Of a table of lists MLflow makes one row.
        rows = [each for cell in model_input["request"] for each in ([cell] if isinstance(cell, str) else cell)]
        return pd.DataFrame({"answer": [self._answered(text) for text in rows]})

    def _answered(self, text: str) -> str:
        import json

        from metateleport.service.message import JSON, Refused, decode, encode

        try:
            return encode(self.answerer.answer(decode(text.encode(), JSON, self.answerer.limits)), JSON).decode()
        except Refused as refused:
            return json.dumps(refused.table())


set_model(AnsweringModel())
