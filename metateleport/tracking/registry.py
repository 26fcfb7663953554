"""MLflow's registry of models: checkpoints under names and aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from metateleport.tracking.delivery import WEIGHTS, experiment_id, run_tagged
from metateleport.tracking.fetch import logged_model_of
from metateleport.tracking.models import find_model, log_model, model_name
from metateleport.tracking.store import TrackingError, connect, reason_of, tracking_uri

__all__ = ["Promoted", "promote"]


class Promoted(NamedTuple):
    """A registered version of a model."""

    name: str
    version: int
    alias: str | None
    model_id: str

    @property
    def address(self) -> str:
        """What `metateleport.load` takes."""
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


def promote(what: str | Path, name: str | None = None, alias: str | None = None, say: Any = None) -> Promoted:
    """Registers a checkpoint as a version of a model, and gives it an alias.

    A checkpoint that is registered under that name already keeps its version. An alias that another version had is
    moved.

    Args:
        what: a run's id, an address (`runs:/...`, `models:/...`), or the folder or bare name of a checkpoint. One that
            MLflow does not have yet is logged.
        name: of the registered model; the checkpoint's name if not given.
        alias: an alias, as `champion`.
        say: called with messages.

    Returns:
        The version.

    Raises:
        TrackingError: if there is no such checkpoint, a name is one that MLflow does not take, or the store cannot be
            reached.
        metateleport.checkpoint.CheckpointError: if the folder holds no checkpoint that can be loaded.
    """
    _check_alias(alias)
    client = connect(tracking_uri(), say)
    try:
        model = _model_of(client, str(what))
        own = name or model.name
        if own != model_name(own):
            raise TrackingError(f"MLflow takes no model name with one of / : . % \" ': {own!r}")
        return _registered(client, model, own, alias)
    except TrackingError:
        raise
    except Exception as error:
        from metateleport.checkpoint import CheckpointError

        if isinstance(error, CheckpointError):
            raise
        raise TrackingError(f"{what} cannot be promoted at {tracking_uri()} ({reason_of(error)})") from error


def _registered(client: Any, model: Any, name: str, alias: str | None) -> Promoted:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={"kind": "metateleport checkpoint"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not every kind of store tells the model's id when it is searched.
    own = (f"models:/{model.model_id}", model.artifact_location)
    known = [
        each
        for each in client.search_model_versions(f"name = '{name}'")
        if model.model_id == getattr(each, "model_id", None) or each.source in own
    ]
    version = known[0] if known else None
    if version is None:
        version = client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=model.source_run_id,
            tags={key: value for key, value in model.tags.items() if not key.startswith("mlflow.")},
            model_id=model.model_id,
        )
    if alias is not None:
        client.set_registered_model_alias(name, alias, version.version)
    return Promoted(name, int(version.version), alias, model.model_id)


def _model_of(client: Any, what: str) -> Any:
    if what.startswith(("runs:/", "models:/")):
        model = logged_model_of(client, what)
        if model is None:
            raise TrackingError(f"{what} has logged no checkpoint")
        return model
    folder = _folder_of(what)
    if folder is None:
        return _of_run(client, what)
    from metateleport.checkpoint import read_card

    card = read_card(folder)
    weights = str(card.get("weights_sha256", ""))
    model = find_model(client, weights)
    if model is not None and str(model.status) == "READY":
        return model
    run = run_tagged(client, WEIGHTS, weights, kind="train")
    family = str(card.get("family", {}).get("name") or "checkpoints")
    experiment = run.info.experiment_id if run else experiment_id(client, family, tracking_uri())
    return log_model(client, folder, experiment, run.info.run_id if run else None)


def _folder_of(what: str) -> Path | None:
    """The checkpoint's folder; None for what may be the id of a run."""
    from metateleport.checkpoint import CheckpointError, load_checkpoint

    try:
        return load_checkpoint(what).path
    except CheckpointError:
        if len(what) == 32 and all(each in "0123456789abcdef" for each in what) and not Path(what).exists():
            return None
        raise


def _of_run(client: Any, run_id: str) -> Any:
    model = logged_model_of(client, f"runs:/{run_id}")
    if model is None:
        run = client.get_run(run_id)
        weights = run.data.tags.get(WEIGHTS)
        model = find_model(client, weights) if weights else None
    if model is None:
        raise TrackingError(f"the run {run_id} has logged no checkpoint: it did not finish, or trained none")
    return model


def _check_alias(alias: str | None) -> None:
    wrong = alias is not None and (not alias.replace("_", "").replace("-", "").isalnum() or alias.lower() == "latest")
    if wrong or (alias is not None and alias.lower().lstrip("v").isdigit()):
        raise TrackingError(
            f"an alias is of letters, digits, - and _, and neither 'latest' nor a version: not {alias!r}"
        )
