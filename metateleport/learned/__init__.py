"""The learned side: networks, the learned teleporter, the meta-optimizer and its differentiable twin."""

from metateleport.learned.gauge_teleporter import GaugeTeleporter
from metateleport.learned.meta_optimizer import MODES, MetaOptimizer, MetaOptimizerConfig, MetaState, Step
from metateleport.learned.stack_optimizer import StackOptimizer
from metateleport.learned.teleporter import LearnedTeleporter

__all__ = [
    "MODES",
    "GaugeTeleporter",
    "LearnedTeleporter",
    "MetaOptimizer",
    "MetaOptimizerConfig",
    "MetaState",
    "StackOptimizer",
    "Step",
]
