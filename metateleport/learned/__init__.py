"""The learned side: networks, the learned teleporter, the learned gauge and the meta-optimizer."""

from metateleport.learned.gauge_teleporter import GaugeTeleporter
from metateleport.learned.meta_optimizer import MODES, MetaOptimizer, MetaOptimizerConfig, MetaState, Step
from metateleport.learned.teleporter import LearnedTeleporter

__all__ = [
    "MODES",
    "GaugeTeleporter",
    "LearnedTeleporter",
    "MetaOptimizer",
    "MetaOptimizerConfig",
    "MetaState",
    "Step",
]
