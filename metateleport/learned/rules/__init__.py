"""Update rules: how the meta-optimizer steps, once it has teleported or chosen its gauges."""

from metateleport.learned.rules.base import BASES, BaseRule, UpdateRule, carried_moments, subtracted

__all__ = [
    "BASES",
    "BaseRule",
    "UpdateRule",
    "carried_moments",
    "subtracted",
]
