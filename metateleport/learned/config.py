"""The shape of a meta-optimizer: its update rule, its teleport and its gauge."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from metateleport.learned.parts import GaugeSettings, TeleportSettings
from metateleport.learned.rules.base import RuleSettings
from metateleport.learned.rules.registry import read_rule
from metateleport.learned.rules.step import StepSettings
from metateleport.settings import SettingsError, shown

__all__ = ["MODES", "MetaOptimizerConfig", "read_networks"]

_GROUP = re.compile(r"\w[\w-]{0,63}")

MODES = ("update", "lr", "update+tele", "lr+tele", "tele")
"""Modes: an update of every coordinate (`update`) or a step for each tensor (`lr`), alone or with group elements
(`+tele`); or group elements alone (`tele`)."""


@dataclasses.dataclass(frozen=True)
class MetaOptimizerConfig:
    """The shape of a meta-optimizer: all settings that are needed to build it again.

    Args:
        rule: the update rule.
        teleport: the teleport that stays; None for none.
        gauge: the gauges that steps are taken in; None for none.
        groups: names of the groups that the teleporter and the gauge have networks for.

    Raises:
        SettingsError: if two of these do not go together.

    Example:
        >>> MetaOptimizerConfig(StepSettings(hidden=8), teleport=None).mode
        'lr'
        >>> MetaOptimizerConfig(gauge=GaugeSettings("exact")).mode
        'lr+tele'
    """

    rule: RuleSettings = dataclasses.field(default_factory=StepSettings)
    teleport: TeleportSettings | None = dataclasses.field(default_factory=TeleportSettings)
    gauge: GaugeSettings | None = None
    groups: tuple[str, ...] = ("GL", "diagonal", "O")

    def __post_init__(self) -> None:
        self.rule.check(self.teleport, self.gauge)
        if self.gauge is not None and not self.gauge_groups:
            raise SettingsError(
                f"gauge.kind = {self.gauge.kind!r} has no element to choose if groups are {', '.join(self.groups)}: "
                "leave the gauge out"
            )

    @property
    def mode(self) -> str:
        """What is learned, one of `MODES`."""
        return "+".join(each for each in (self.rule.learns, "tele" if self.teleports else "") if each)

    @property
    def teleports(self) -> bool:
        """Whether group elements are learned."""
        return self.teleport is not None or self.gauge is not None

    @property
    def steps(self) -> bool:
        """Whether the step is learned."""
        return bool(self.rule.learns)

    @property
    def linearised(self) -> bool:
        """Whether gauges are also taken along pairs of layers with an activation between them."""
        return self.gauge is not None and self.gauge.kind == "linearised"

    @property
    def gauge_groups(self) -> tuple[str, ...]:
        """Names of the groups that the gauge has networks for."""
        linearised = ("GL",) if self.linearised else ()
        return tuple(dict.fromkeys((*(group for group in self.groups if group != "O"), *linearised)))

    def without_teleport(self) -> MetaOptimizerConfig:
        """The same step without teleports and gauges."""
        return dataclasses.replace(self, teleport=None, gauge=None)

    def table(self) -> dict[str, Any]:
        """The shape as JSON has it."""
        parts = {"rule": self.rule, "teleport": self.teleport, "gauge": self.gauge}
        tables = {name: part.table() for name, part in parts.items() if part is not None}
        return {**tables, "groups": list(self.groups)}

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> MetaOptimizerConfig:
        """The shape from a table that `table` returned.

        Raises:
            SettingsError: if it has unknown keys or values that are not allowed.
        """
        for name in table:
            if name not in ("rule", "teleport", "gauge", "groups"):
                raise SettingsError(f"a meta-optimizer has no {shown(name)}: it has rule, teleport, gauge and groups")
        groups = table.get("groups")
        if not isinstance(groups, (list, tuple)) or not all(isinstance(each, str) for each in groups):
            raise SettingsError(f"groups is a list of the names of groups, not {shown(groups)}")
        for name in groups:
            # They name parts of networks, and come from files.
            if not _GROUP.fullmatch(name) or groups.count(name) > 1 or hasattr(nn.ModuleDict, name):
                raise SettingsError(f"groups cannot have {shown(name)}: it has names of letters, each of them once")
        return cls(*read_networks(table), groups=tuple(groups))


def read_networks(
    tables: Mapping[str, Any],
) -> tuple[RuleSettings, TeleportSettings | None, GaugeSettings | None]:
    """The parts of a meta-optimizer from the tables `rule`, `teleport` and `gauge`; the last two may be left out.

    Raises:
        SettingsError: if one of them is not allowed.

    Example:
        >>> read_networks({"rule": {"kind": "lr"}})[1:]
        (None, None)
    """
    for part in ("rule", "teleport", "gauge"):
        if not isinstance(tables.get(part, {}), Mapping):
            raise SettingsError(f"{part} is a table of settings, not {shown(tables[part])}")
    rule = read_rule(tables.get("rule", {}))
    teleport = TeleportSettings.read(tables["teleport"]) if "teleport" in tables else None
    return rule, teleport, GaugeSettings.read(tables["gauge"]) if "gauge" in tables else None
