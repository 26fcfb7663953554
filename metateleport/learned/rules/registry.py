"""The update rules, by their kind, which is their name in recipes and in checkpoints' cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metateleport.learned.rules.adaptive import AdaptiveSettings
from metateleport.learned.rules.base import BaseOptimizerSettings, RuleSettings
from metateleport.learned.rules.coordinate import CoordinateSettings
from metateleport.learned.rules.gauged import GaugedSettings
from metateleport.learned.rules.static import StaticSettings
from metateleport.learned.rules.step import StepSettings
from metateleport.learned.rules.tensor import TensorSettings
from metateleport.settings import SettingsError, nearest

__all__ = ["known_rules", "read_rule", "register"]

_RULES: dict[str, type[RuleSettings]] = {}


def register(settings: type[RuleSettings]) -> type[RuleSettings]:
    """Makes an update rule known by the `kind` of its settings.

    A new rule is one file: an `UpdateRule`, its `RuleSettings`, and this call. To load a checkpoint that was trained
    with it, import that file first.

    Args:
        settings: the class of the rule's settings.

    Returns:
        The class, so that this can be used as a decorator.

    Raises:
        ValueError: if the kind is empty, or another rule has it.

    Example:
        >>> register(StepSettings).kind
        'lr'
    """
    known = _RULES.get(settings.kind, settings)
    # A file that is imported again defines its classes again.
    if (known.__module__, known.__qualname__) != (settings.__module__, settings.__qualname__) or not settings.kind:
        raise ValueError(f"rule.kind {settings.kind!r} of {settings.__name__} is taken or empty: give it another")
    _RULES[settings.kind] = settings
    return settings


def known_rules() -> dict[str, type[RuleSettings]]:
    """The settings of all update rules by their kind."""
    return dict(_RULES)


def read_rule(table: Mapping[str, Any]) -> RuleSettings:
    """The settings of an update rule.

    Args:
        table: `kind`, and settings of a rule of this kind.

    Returns:
        The settings.

    Raises:
        SettingsError: if no rule of this kind is known, it lacks a setting, or a value is not allowed.

    Example:
        >>> read_rule({"kind": "adaptive", "secants": 3})
        Traceback (most recent call last):
        metateleport.settings.SettingsError: rule.secants does not go with rule.kind = 'adaptive', which has: hidden, \
cooling, told, guarded
    """
    own = dict(table)
    kind = str(own.pop("kind", ""))
    if kind not in _RULES:
        said = f"rule.kind is missing: it is one of {', '.join(_RULES)}"
        if kind:
            said = (
                f"no update rule of rule.kind = {kind!r} is known: known are {', '.join(_RULES)}. Import the file of "
                "your own rule first; those of the source paper by 'import metateleport.papers'"
            )
        raise SettingsError(said)
    every, has = {name for settings in _RULES.values() for name in settings.names()}, _RULES[kind].names()
    for name in own:
        if name not in has and name in every:
            raise SettingsError(f"rule.{name} does not go with rule.kind = {kind!r}, which has: {', '.join(has)}")
        if name not in has:
            raise SettingsError(f"there is no setting rule.{name}: the nearest is rule.{nearest(name, (*has, 'kind'))}")
    return _RULES[kind].read(own)


for _each in (
    StepSettings,
    CoordinateSettings,
    TensorSettings,
    AdaptiveSettings,
    StaticSettings,
    GaugedSettings,
    BaseOptimizerSettings,
):
    register(_each)
