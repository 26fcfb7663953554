"""metateleport: learns to teleport along the symmetries of a network's loss.

The names here are what a person needs first; each room of the package has the rest, as `metateleport.symmetries` does.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metateleport.sources import register_source
from metateleport.version import VERSION

if TYPE_CHECKING:
    from metateleport.checkpoint import Checkpoint, load, load_checkpoint
    from metateleport.detection import Symmetries, certify, find_symmetries, symmetries_of
    from metateleport.families import Task, TaskFamily, load_family
    from metateleport.optim import GaugedOptimizer, LearnedOptimizer, TeleportingOptimizer
    from metateleport.service import connect
    from metateleport.symmetries import LinearPair, Rescaling, Symmetry
    from metateleport.teleporters import (
        GradientAscentTeleporter,
        NoTeleport,
        RandomTeleporter,
        Teleporter,
        TeleportReport,
        WhiteningTeleporter,
        teleport,
    )

__version__ = VERSION

__all__ = [
    "Checkpoint",
    "GaugedOptimizer",
    "GradientAscentTeleporter",
    "LearnedOptimizer",
    "LinearPair",
    "NoTeleport",
    "RandomTeleporter",
    "Rescaling",
    "Symmetries",
    "Symmetry",
    "Task",
    "TaskFamily",
    "TeleportReport",
    "Teleporter",
    "TeleportingOptimizer",
    "WhiteningTeleporter",
    "certify",
    "connect",
    "find_symmetries",
    "load",
    "load_checkpoint",
    "load_family",
    "symmetries_of",
    "teleport",
]

_HOMES = {
    "Checkpoint": "metateleport.checkpoint",
    "GaugedOptimizer": "metateleport.optim",
    "GradientAscentTeleporter": "metateleport.teleporters",
    "LearnedOptimizer": "metateleport.optim",
    "LinearPair": "metateleport.symmetries",
    "NoTeleport": "metateleport.teleporters",
    "RandomTeleporter": "metateleport.teleporters",
    "Rescaling": "metateleport.symmetries",
    "Symmetries": "metateleport.detection",
    "Symmetry": "metateleport.symmetries",
    "Task": "metateleport.families",
    "TaskFamily": "metateleport.families",
    "TeleportReport": "metateleport.teleporters",
    "Teleporter": "metateleport.teleporters",
    "TeleportingOptimizer": "metateleport.optim",
    "WhiteningTeleporter": "metateleport.teleporters",
    "certify": "metateleport.detection",
    "connect": "metateleport.service",
    "find_symmetries": "metateleport.detection",
    "load": "metateleport.checkpoint",
    "load_checkpoint": "metateleport.checkpoint",
    "load_family": "metateleport.families",
    "symmetries_of": "metateleport.detection",
    "teleport": "metateleport.teleporters",
}
"""Where each name is. A room is imported when one of its names is first asked for: torch takes a second, and
`metateleport --help` need not wait for it."""


def _fetched(address: str) -> Path:
    """The folder of a checkpoint that MLflow has, downloaded; MLflow is imported now and not before."""
    fetch: Callable[[str], Path] = importlib.import_module("metateleport.tracking").fetch_checkpoint
    return fetch(address)


for _scheme in ("runs", "models"):
    register_source(_scheme, _fetched)

# Names that stood here before 0.3.0, by the room that has them now; they go with 0.4.0.
_MOVED = {
    "metateleport.checkpoint": ("CheckpointError",),
    "metateleport.detection": ("Refused",),
    "metateleport.families": ("FamilyError", "Measure", "ProbedLosses", "TaskStack"),
    "metateleport.groups": ("GeneralLinear", "Group", "Orthogonal", "PositiveDiagonal"),
    "metateleport.learned": ("GaugeTeleporter", "LearnedTeleporter", "MetaOptimizer", "MetaOptimizerConfig"),
    "metateleport.objectives": ("Curvature", "Objective", "Sharpness", "SquaredGradientNorm"),
    "metateleport.optim": ("AtSteps", "Every", "Schedule", "WhenStalled"),
    "metateleport.point": ("Point",),
    "metateleport.symmetries": ("BatchPair2022", "BatchPair2024", "Certificate", "QuadraticRotation", "Unsuitable"),
    "metateleport.teleporters": ("FreeTeleporter", "LevelSetTeleporter", "NullSpaceTeleporter", "TrustRegion"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    for room, names in _MOVED.items():
        if name in names:
            warnings.warn(
                f"metateleport.{name} is {room}.{name} now, and the old name goes with 0.4.0: import it from there",
                FutureWarning,
                stacklevel=2,
            )
            return getattr(importlib.import_module(room), name)
    if name == "StackedModel":
        raise AttributeError(
            "StackedModel and TaskStack are one class now: metateleport.families.TaskStack(tasks), itself the module "
            "whose parameters have the task dimension in front"
        )
    if not name.startswith("_") and importlib.util.find_spec(f"metateleport.{name}") is not None:
        return importlib.import_module(f"metateleport.{name}")
    raise AttributeError(f"module 'metateleport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
