"""Objectives: functions of a point that teleports raise or lower, differentiable in the group element."""

from metateleport.objectives.base import Objective
from metateleport.objectives.curvature import Curvature
from metateleport.objectives.gradient_norm import SquaredGradientNorm
from metateleport.objectives.sharpness import Sharpness

__all__ = ["Curvature", "Objective", "Sharpness", "SquaredGradientNorm"]
