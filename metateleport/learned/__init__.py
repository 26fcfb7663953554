"""The meta-optimizer and its parts: update rules, the learned teleporter and the learned gauge."""

from metateleport.learned.config import MODES, MetaOptimizerConfig
from metateleport.learned.gauge_teleporter import GaugeTeleporter
from metateleport.learned.meta_optimizer import MetaOptimizer, MetaState, Step
from metateleport.learned.parts import GaugeSettings, TeleportSettings
from metateleport.learned.rules import (
    AdaptiveSettings,
    BaseOptimizerSettings,
    CoordinateSettings,
    RuleSettings,
    StepSettings,
    TensorSettings,
)
from metateleport.learned.teleporter import LearnedTeleporter

__all__ = [
    "MODES",
    "AdaptiveSettings",
    "BaseOptimizerSettings",
    "CoordinateSettings",
    "GaugeSettings",
    "GaugeTeleporter",
    "LearnedTeleporter",
    "MetaOptimizer",
    "MetaOptimizerConfig",
    "MetaState",
    "RuleSettings",
    "Step",
    "StepSettings",
    "TeleportSettings",
    "TensorSettings",
]
