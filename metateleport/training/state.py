"""The state of an unfinished training: one file, which a later run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metateleport.files import FileError, read_regular, replacing
from metateleport.settings import SettingsError, shown
from metateleport.training.progression import Progression, Snapshot
from metateleport.training.recipe import Recipe, TrainingError

__all__ = [
    "TrainingState",
    "begun",
    "different",
    "first_difference",
    "nothing_to_resume",
    "read_state",
    "resume_folder",
    "seeds_folder",
    "write_state",
]

STATE = "state.safetensors"
_FORMAT = 1
_KEPT = "-kept"
_MOST = 8 << 30
"""Bytes of the largest state that is read."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything that a later run needs to go on as if there had been no interruption.

    Args:
        recipe: the recipe of the training, with all settings of its family.
        snapshots: a snapshot for each network.
        tracking_run: id of the MLflow run that the training is tracked in; None if it is not tracked.
    """

    recipe: Recipe
    snapshots: Mapping[str, Snapshot]
    tracking_run: str | None = None


def resume_folder(out: str | Path) -> Path:
    """The folder beside the final checkpoint where the state of an unfinished training is saved."""
    return _beside(Path(out), "unfinished")


def seeds_folder(out: str | Path) -> Path:
    """The folder beside the final checkpoint where finished meta-seeds wait for the others."""
    return _beside(Path(out), "meta-seeds")


def _beside(out: Path, suffix: str) -> Path:
    if out.name in ("", ".."):
        raise FileError(f"{str(out)!r} has no name of its own: give the checkpoint's folder one")
    return out.with_name(f"{out.name}.{suffix}")


def write_state(folder: Path, state: TrainingState) -> None:
    """Writes a state by a single rename: at every moment the folder has the last whole state or the new one.

    Raises:
        OSError: if it cannot be written; the last whole state is still there.
    """
    tensors: dict[str, Tensor] = {}
    progressions = {}
    for name, snapshot in state.snapshots.items():
        for part, each in {name: snapshot, name + _KEPT: snapshot.kept}.items():
            if each is not None:
                tensors.update({f"{part}/{key}": value for key, value in each.tensors.items()})
                # JSON has no infinity, which is the score before the first validation.
                progressions[part] = {**each.progression, "best": min(each.progression["best"], 1e300)}
    known = {
        "format": _FORMAT,
        "recipe": state.recipe.table(),
        "progressions": progressions,
        "tracking_run": state.tracking_run,
        "tensors_sha256": _digest(tensors),
    }
    content = save(tensors, metadata={"state": json.dumps(known, allow_nan=False)})
    with replacing(folder / STATE, durable=True) as temporary:
        temporary.write_bytes(content)


def begun(folder: Path) -> bool:
    """Whether a folder has the state of an unfinished training, of this version or of an earlier one."""
    return (folder / STATE).exists() or (folder / "state.json").exists()


def nothing_to_resume(folder: Path) -> TrainingError:
    """The error where `--resume` is given and no training has been begun."""
    return TrainingError(f"there is nothing to resume: {folder} does not exist. Start without --resume")


def different(folder: Path, started: Recipe, wanted: Recipe) -> TrainingError | None:
    """The error where a training is to go on with another recipe; None if it is the same one."""
    changed = first_difference(started, wanted)
    if changed is None:
        return None
    return TrainingError(
        f"the training in {folder} was started with {changed}: resume with the same settings, or remove the folder "
        "and start anew"
    )


def read_state(folder: Path) -> TrainingState | None:
    """The state in a folder; None if there is none.

    Raises:
        TrainingError: if it is damaged or of another version.
    """
    if not (folder / STATE).exists():
        if (folder / "state.json").exists():
            raise TrainingError(
                f"the training in {folder} was begun by an earlier version of metateleport, which kept its state "
                "otherwise: finish it with that version, or remove the folder and start anew"
            )
        return None
    try:
        content = read_regular(folder / STATE, _MOST)
        tensors, known = load(content), _metadata(content)
    except (FileError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"{folder / STATE} cannot be read ({error}): remove {folder} and start anew") from error
    if not isinstance(known, dict) or known.get("format") != _FORMAT:
        wrote = known.get("format") if isinstance(known, dict) else None
        raise TrainingError(
            f"{folder / STATE} is a state of format {shown(wrote)}, and this version reads {_FORMAT}: finish the "
            "training with the version that began it, or remove the folder and start anew"
        )
    try:
        if known["tensors_sha256"] != _digest(tensors):
            raise ValueError("its tensors are not those that were written")
        tracking_run = known["tracking_run"]
        if tracking_run is not None and not isinstance(tracking_run, str):
            raise TypeError(f"tracking_run is a text, not {shown(tracking_run)}")
        snapshots = _snapshots(tensors, known["progressions"])
        return TrainingState(Recipe.read(known["recipe"]), snapshots, tracking_run)
    except (KeyError, TypeError, ValueError, AttributeError, SettingsError) as error:
        raise TrainingError(
            f"{folder / STATE} is not the state of a training ({error}): remove {folder} and start anew"
        ) from error


def first_difference(started: Recipe, wanted: Recipe) -> str | None:
    """A sentence on the first setting that differs from the one at the start; the device may differ.

    Example:
        >>> from metateleport.training import FamilySettings, TruncatedSettings
        >>> recipes = (Recipe(FamilySettings("digits"), outer=TruncatedSettings(seed=seed)) for seed in (1, 2))
        >>> first_difference(*recipes)
        'outer.seed = 1, not 2'
    """
    before, now = started.flat(), wanted.flat()
    for key in (*now, *before):
        if key != "outer.device" and before.get(key) != now.get(key):
            return f"{key} = {before.get(key)!r}, not {now.get(key)!r}"
    return None


def _snapshots(tensors: Mapping[str, Tensor], progressions: Mapping[str, Any]) -> dict[str, Snapshot]:
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in progressions}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    for progression in progressions.values():
        # A field that another version has, or lacks, is named here and not when the training goes on.
        Progression(**progression)
    found = {name: Snapshot(parts[name], dict(progressions[name])) for name in progressions}
    return {
        name: dataclasses.replace(each, kept=found.get(name + _KEPT))
        for name, each in found.items()
        if not name.endswith(_KEPT)
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _metadata(content: bytes) -> Any:
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
