"""What a person holds in a training loop."""

from metateleport.optim.teleporting import TeleportingOptimizer

__all__ = ["TeleportingOptimizer"]
