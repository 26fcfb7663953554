"""Update rules: how the meta-optimizer computes the step after the teleport and the choice of gauges."""

from metateleport.learned.rules.adaptive import AdaptiveSettings
from metateleport.learned.rules.base import (
    BASES,
    BaseOptimizerSettings,
    BaseRule,
    RuleSettings,
    UpdateRule,
    carried_moments,
    subtracted,
)
from metateleport.learned.rules.coordinate import CoordinateSettings
from metateleport.learned.rules.registry import known_rules, read_rule, register
from metateleport.learned.rules.static import StaticSettings
from metateleport.learned.rules.step import StepSettings
from metateleport.learned.rules.tensor import TensorSettings

__all__ = [
    "BASES",
    "AdaptiveSettings",
    "BaseOptimizerSettings",
    "BaseRule",
    "CoordinateSettings",
    "RuleSettings",
    "StaticSettings",
    "StepSettings",
    "TensorSettings",
    "UpdateRule",
    "carried_moments",
    "known_rules",
    "read_rule",
    "register",
    "subtracted",
]
