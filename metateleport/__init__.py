"""metateleport: learns to teleport along the symmetries of a network's loss."""

from metateleport.detect import symmetries_of
from metateleport.families import FamilyError, Task, TaskFamily, TaskStack, load_family
from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.objectives import Objective, SquaredGradientNorm
from metateleport.point import Point
from metateleport.stack import StackedModel
from metateleport.symmetries import (
    BatchPair2022,
    BatchPair2024,
    LinearPair,
    QuadraticRotation,
    Rescaling,
    Symmetry,
    Unsuitable,
)
from metateleport.teleporters import (
    GradientAscentTeleporter,
    NoTeleport,
    RandomTeleporter,
    Teleporter,
    TeleportReport,
    TrustRegion,
    teleport,
)

__all__ = [
    "BatchPair2022",
    "BatchPair2024",
    "FamilyError",
    "GeneralLinear",
    "GradientAscentTeleporter",
    "Group",
    "LinearPair",
    "NoTeleport",
    "Objective",
    "Orthogonal",
    "Point",
    "PositiveDiagonal",
    "QuadraticRotation",
    "RandomTeleporter",
    "Rescaling",
    "SquaredGradientNorm",
    "StackedModel",
    "Symmetry",
    "Task",
    "TaskFamily",
    "TaskStack",
    "TeleportReport",
    "Teleporter",
    "TrustRegion",
    "Unsuitable",
    "load_family",
    "symmetries_of",
    "teleport",
]
