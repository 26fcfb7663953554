"""Checkpoints that MLflow has: their weights and card are downloaded, and no code of an artifact ever runs."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from metateleport.files import cache_folder, replacing_folder
from metateleport.tracking.models import FILES
from metateleport.tracking.store import TrackingError, connect, reason_of, tracking_uri

__all__ = ["fetch_checkpoint", "logged_model_of"]

_MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?$")
_RUN = re.compile(r"runs:/(?P<run>[^/]+)(?:/(?P<path>.+))?$")
_LARGEST = 1 << 30
_SEEDS = re.compile(r"meta_seeds/\d+/[^/]+$")


def fetch_checkpoint(address: str) -> Path:
    """The folder of a checkpoint in MLflow, downloaded into the cache.

    Downloaded are `card.json`, `weights.safetensors` and `recipe.toml`, those of its other meta-seeds included. The
    model's code is not, and MLflow's own loading is not used.

    Args:
        address: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/NAME` for the latest version, `models:/ID`,
            `runs:/RUN` or `runs:/RUN/NAME`.

    Returns:
        The folder, named after the model.

    Raises:
        TrackingError: if it is not there, or the store cannot be reached; the message says what to do.
    """
    client = connect(tracking_uri())
    try:
        model = logged_model_of(client, address)
        if model is not None:
            return _downloaded(_ModelFiles(client, model))
        run, path = _RUN.match(address)["run"], _RUN.match(address)["path"]  # type: ignore[index]
        return _downloaded(_RunFiles(client, run, path))
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"{address} cannot be fetched from {tracking_uri()} ({reason_of(error)}): see what is there with "
            "metateleport ui, or set MLFLOW_TRACKING_URI"
        ) from error


def logged_model_of(client: Any, address: str) -> Any:
    """The LoggedModel of an address; None if it is of a run that has logged none.

    Raises:
        TrackingError: if it is no address of a model or a run.
    """
    found = _MODEL.match(address)
    if found is not None:
        name = found["name"]
        if found["alias"]:
            version = client.get_model_version_by_alias(name, found["alias"])
        elif found["version"]:
            version = client.get_model_version(name, found["version"])
        elif re.fullmatch(r"m-[0-9a-f]{32}", name):
            return client.get_logged_model(name)
        else:
            versions = client.search_model_versions(f"name = '{name}'")
            if not versions:
                raise TrackingError(
                    f"no model {name!r} is registered at {tracking_uri()}: register one with metateleport promote"
                )
            version = max(versions, key=lambda each: int(each.version))
        identity = getattr(version, "model_id", None) or str(version.source).removeprefix("models:/")
        return client.get_logged_model(identity)
    found = _RUN.match(address)
    if found is None:
        raise TrackingError(
            f"{address!r} is no address of a checkpoint: give models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN"
        )
    run = client.get_run(found["run"])
    outputs = getattr(run.outputs, "model_outputs", None) or ()
    for output in sorted(outputs, key=lambda each: each.step, reverse=True):
        model = client.get_logged_model(output.model_id)
        if found["path"] in (None, model.name):
            return model
    return None


class _ModelFiles:
    """The artifacts of a LoggedModel."""

    def __init__(self, client: Any, model: Any) -> None:
        self.client, self.key, self.name = client, model.model_id, model.name
        self._id, self._place = model.model_id, model.artifact_location

    def listed(self, path: str) -> list[Any]:
        return list(self.client.list_logged_model_artifacts(self._id, path))

    def download(self, path: str, into: Path) -> Path:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        place = get_artifact_repository(self._place, tracking_uri=tracking_uri())
        return Path(place.download_artifacts(path, str(into)))

    def root(self) -> str:
        """The folder that has the card."""
        for entry in self.listed("artifacts"):
            if entry.is_dir and any(each.path.endswith("/card.json") for each in self.listed(entry.path)):
                return str(entry.path)
        raise TrackingError(f"the model {self.name} ({self._id}) holds no checkpoint of metateleport")


class _RunFiles:
    """The artifacts of a run, among which versions before 0.3.0 kept checkpoints."""

    def __init__(self, client: Any, run: str, path: str | None) -> None:
        self.client, self.run, self.path = client, run, path
        self.key, self.name = run, path or ""

    def listed(self, path: str) -> list[Any]:
        return list(self.client.list_artifacts(self.run, path or None))

    def download(self, path: str, into: Path) -> Path:
        return Path(self.client.download_artifacts(self.run, path, str(into)))

    def root(self) -> str:
        for folder in [self.path] if self.path else [each.path for each in self.listed("") if each.is_dir]:
            if any(Path(each.path).name == "card.json" for each in self.listed(str(folder))):
                self.name = Path(str(folder)).name
                return str(folder)
        raise TrackingError(f"the run {self.run} has no checkpoint" + (f" {self.path}" if self.path else ""))


def _downloaded(files: _ModelFiles | _RunFiles) -> Path:
    root = files.root()
    folder = cache_folder("models") / files.key / Path(root).name
    # What a model holds never changes.
    if (folder / "card.json").is_file() and isinstance(files, _ModelFiles):
        return folder
    with replacing_folder(folder) as temporary, tempfile.TemporaryDirectory() as scratch:
        for path in _wanted(files, root):
            place = temporary / Path(path).relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(files.download(path, Path(scratch)), place)
    return folder


def _wanted(files: _ModelFiles | _RunFiles, root: str) -> list[str]:
    """Paths of what belongs to a checkpoint, by name."""
    found, folders = [], [root]
    while folders:
        for each in files.listed(folders.pop()):
            inside = str(Path(each.path).relative_to(root))
            if each.is_dir:
                if inside == "meta_seeds" or re.fullmatch(r"meta_seeds/\d+", inside):
                    folders.append(each.path)
            elif Path(inside).name in FILES and (inside in FILES or _SEEDS.match(inside)):
                if (each.file_size or 0) > _LARGEST:
                    raise TrackingError(f"{each.path} has {each.file_size} bytes, which no checkpoint has")
                found.append(each.path)
    return found
