"""metateleport: learns to teleport along the symmetries of a network's loss."""

from metateleport.checkpoint import Checkpoint, CheckpointError, load, load_checkpoint
from metateleport.detection import Certificate, Refused, Symmetries, certify, find_symmetries
from metateleport.detection.chain import symmetries_of
from metateleport.families import FamilyError, Measure, Task, TaskFamily, TaskStack, load_family
from metateleport.families.probed import ProbedLosses
from metateleport.families.stack import StackedModel
from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.learned import (
    GaugeTeleporter,
    LearnedTeleporter,
    MetaOptimizer,
    MetaOptimizerConfig,
)
from metateleport.objectives import Curvature, Objective, Sharpness, SquaredGradientNorm
from metateleport.optim import LearnedOptimizer, TeleportingOptimizer
from metateleport.optim.schedules import AtSteps, Every, Schedule, WhenStalled
from metateleport.point import Point
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
    FreeTeleporter,
    GradientAscentTeleporter,
    LevelSetTeleporter,
    NoTeleport,
    NullSpaceTeleporter,
    RandomTeleporter,
    Teleporter,
    TeleportReport,
    TrustRegion,
    WhiteningTeleporter,
    teleport,
)
from metateleport.version import VERSION

__version__ = VERSION

__all__ = [
    "AtSteps",
    "BatchPair2022",
    "BatchPair2024",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "Curvature",
    "Every",
    "FamilyError",
    "FreeTeleporter",
    "GaugeTeleporter",
    "GeneralLinear",
    "GradientAscentTeleporter",
    "Group",
    "LearnedOptimizer",
    "LearnedTeleporter",
    "LevelSetTeleporter",
    "LinearPair",
    "Measure",
    "MetaOptimizer",
    "MetaOptimizerConfig",
    "NoTeleport",
    "NullSpaceTeleporter",
    "Objective",
    "Orthogonal",
    "Point",
    "PositiveDiagonal",
    "ProbedLosses",
    "QuadraticRotation",
    "RandomTeleporter",
    "Refused",
    "Rescaling",
    "Schedule",
    "Sharpness",
    "SquaredGradientNorm",
    "StackedModel",
    "Symmetries",
    "Symmetry",
    "Task",
    "TaskFamily",
    "TaskStack",
    "TeleportReport",
    "Teleporter",
    "TeleportingOptimizer",
    "TrustRegion",
    "Unsuitable",
    "WhenStalled",
    "WhiteningTeleporter",
    "certify",
    "find_symmetries",
    "load",
    "load_checkpoint",
    "load_family",
    "symmetries_of",
    "teleport",
]
