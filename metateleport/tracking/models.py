"""Checkpoints as MLflow's LoggedModels: safetensors and JSON beside a small file of code, nothing pickled."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from metateleport.version import VERSION

__all__ = ["FILES", "find_model", "log_model", "model_name", "save_as_model"]

MODEL_TYPE = "metateleport checkpoint"
WEIGHTS = "weights"
"""The tag of a LoggedModel with the hash of its weights."""

FILES = ("card.json", "weights.safetensors", "recipe.toml")
"""What a checkpoint's folder is copied of, and downloaded of."""

_CODE = Path(__file__).with_name("answering_model.py")


def model_name(name: str) -> str:
    """A name that MLflow takes for a model: it allows none of `/ : . % " '`.

    Example:
        >>> model_name("v1.5/lora")
        'v1-5-lora'
    """
    return "".join("-" if each in "/:.%\"'" else each for each in name) or "checkpoint"


def find_model(client: Any, weights: str) -> Any:
    """The oldest LoggedModel whose weights have this hash, in any experiment; None if there is none."""
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_logged_models(
        experiments,
        f"tags.{WEIGHTS} = '{weights}'",
        max_results=1,
        order_by=[{"field_name": "creation_timestamp", "ascending": True}],
    )
    return found[0] if found else None


def log_model(client: Any, path: Path, experiment: str, run_id: str | None = None, step: int = 0) -> Any:
    """Logs a checkpoint as a LoggedModel; one with the same weights that the run has already stays the only one.

    Args:
        client: MLflow's client.
        path: the checkpoint's folder.
        experiment: id of the experiment that it belongs to.
        run_id: the run that made it, if there is one.
        step: the meta-step that it is of.

    Returns:
        MLflow's LoggedModel.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    card = json.loads((path / "card.json").read_text())
    weights = str(card.get("weights_sha256", ""))
    known = client.search_logged_models([experiment], f"tags.{WEIGHTS} = '{weights}'")
    for each in known:
        if each.source_run_id == run_id and str(each.status) == "READY":
            return each
    model = client.create_logged_model(
        experiment,
        name=model_name(path.name),
        source_run_id=run_id,
        tags={WEIGHTS: weights, "family": str(card.get("family", {}).get("name", "")), "mode": str(card.get("mode"))},
        params={f"card.{key}": str(value)[:250] for key, value in _facts(card).items()},
        model_type=MODEL_TYPE,
    )
    with tempfile.TemporaryDirectory() as folder:
        described = Model(
            artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id, model_uuid=model.model_id
        )
        save_as_model(path, Path(folder) / "model", described)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        _rank(client, model, run_id, step)
    return client.finalize_logged_model(model.model_id, "READY")


def save_as_model(path: Path, into: Path, described: Any = None) -> None:
    """Writes a checkpoint as a model of MLflow's: its code, the checkpoint, signature and an example. No pickle.

    Args:
        path: the checkpoint's folder.
        into: the folder to write.
        described: MLflow's description of the model, which is completed.
    """
    from mlflow.models.signature import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = Path(folder) / path.name
        _copy(path, copied)
        save_model(
            into,
            python_model=str(_CODE),
            artifacts={"checkpoint": str(copied)},
            signature=ModelSignature(Schema([ColSpec("string", "request")]), Schema([ColSpec("string", "answer")])),
            input_example=_example(),
            pip_requirements=[f"metateleport=={VERSION}", "mlflow>=3.17,<4"],
            mlflow_model=described,
        )


def _rank(client: Any, model: Any, run_id: str, step: int) -> None:
    """Gives the model the final figures of its run, by which models are ranked."""
    from mlflow.entities import Metric

    figures = {name: value for name, value in client.get_run(run_id).data.metrics.items() if name.startswith("final/")}
    stamp = model.creation_timestamp
    points = [Metric(name, value, stamp, step, model_id=model.model_id) for name, value in figures.items()]
    if points:
        client.log_batch(run_id, metrics=points)


def _copy(path: Path, into: Path) -> None:
    """Copies what belongs to a checkpoint, those of its other meta-seeds included."""
    for file in (each for name in FILES for each in (path / name, *path.glob(f"meta_seeds/*/{name}"))):
        if file.is_file():
            place = into / file.relative_to(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _facts(card: dict[str, Any]) -> dict[str, Any]:
    known = card.get("training", {}).get("runs", {}).get("learned", {})
    return {
        "mode": card.get("mode"),
        "family": card.get("family", {}).get("name"),
        "validation": known.get("validation"),
        "meta_steps": known.get("meta_steps"),
        "meta_seeds": len(card.get("meta_seeds", ())) or 1,
    }


def _example() -> Any:
    import pandas as pd

    return pd.DataFrame({"request": [json.dumps({"schema": 1, "ask": "about"})]})
