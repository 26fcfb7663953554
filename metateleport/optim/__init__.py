"""Optimizers for a training loop of one's own, and schedules that say when a teleport is due."""

from metateleport.optim.gauged import GaugedOptimizer
from metateleport.optim.learned import LearnedOptimizer
from metateleport.optim.schedules import AtSteps, Every, Schedule, WhenStalled
from metateleport.optim.teleporting import TeleportingOptimizer

__all__ = ["AtSteps", "Every", "GaugedOptimizer", "LearnedOptimizer", "Schedule", "TeleportingOptimizer", "WhenStalled"]
