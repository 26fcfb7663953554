"""What a person holds: optimizers for a training loop of their own."""

from metateleport.optim.learned import LearnedOptimizer
from metateleport.optim.teleporting import TeleportingOptimizer

__all__ = ["LearnedOptimizer", "TeleportingOptimizer"]
