"""The learned side: networks, the learned teleporter, the meta-optimizer and its differentiable twin."""

from metateleport.learned.gauge_teleporter import GaugeTeleporter
from metateleport.learned.meta_optimizer import MODES, MetaOptimizer, MetaOptimizerConfig, MetaState, Step
from metateleport.learned.optimizer import LearnedOptimizer, StackOptimizer
from metateleport.learned.teleporter import LearnedTeleporter

__all__ = [
    "MODES",
    "GaugeTeleporter",
    "LearnedOptimizer",
    "LearnedTeleporter",
    "MetaOptimizer",
    "MetaOptimizerConfig",
    "MetaState",
    "StackOptimizer",
    "Step",
]
