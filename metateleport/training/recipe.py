"""Recipes: all settings of a meta-training in nested tables, which refuse settings that do not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from metateleport.families import TaskFamily
from metateleport.learned.config import MetaOptimizerConfig, read_networks
from metateleport.learned.parts import GaugeSettings, TeleportSettings
from metateleport.learned.rules import RuleSettings, StepSettings, known_rules
from metateleport.settings import AT_LEAST_ONE, Settings, SettingsError, Text, flattened, nearest, setting
from metateleport.training.outer import ESTIMATORS, OuterSettings, TruncatedSettings, read_outer

__all__ = ["FamilySettings", "Recipe", "TrainingError", "ValidationSettings", "device_for"]

PARTS = ("family", "rule", "teleport", "gauge", "outer", "validation")


class TrainingError(ValueError):
    """A meta-training cannot begin or go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class FamilySettings(Settings):
    """The tasks: a family and its settings. In the table the settings stand beside the name.

    Args:
        name: the task family's bare name, or the path of its file.
        settings: its settings, including those of a mixture if the family has one.
    """

    part: ClassVar[str] = "family"

    name: str = setting()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> FamilySettings:
        if "name" not in table:
            raise SettingsError("family.name is missing: the bare name of a task family, or the path of its file")
        return cls(table["name"], {name: value for name, value in table.items() if name != "name"})

    def table(self) -> dict[str, Any]:
        return {"name": self.name, **self.settings}


@dataclasses.dataclass(frozen=True)
class ValidationSettings(Settings):
    """How the networks of the checkpoint are chosen.

    Args:
        tasks: number of validation tasks.
        every: meta-steps between validations; the last one is always at the end. In a limited time some are left
            out, so that they take no large share of it.
    """

    part: ClassVar[str] = "validation"

    tasks: int = setting(32, AT_LEAST_ONE, 10**6)
    every: int = setting(20, AT_LEAST_ONE, 10**9)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a meta-training. A checkpoint has them in its `recipe.toml` and in its card.

    Args:
        family: the tasks.
        rule: the update rule.
        teleport: the teleport that stays; None, or no such table, for none.
        gauge: the gauges that steps are taken in; None, or no such table, for none.
        outer: the outer loop.
        validation: how the checkpoint is chosen.

    Raises:
        SettingsError: if two settings do not go together.

    Example:
        >>> family = FamilySettings("leaky_mlp", {"width": 12})
        >>> recipe = Recipe(family, teleport=None, gauge=GaugeSettings("linearised"))
        >>> recipe.mode
        'lr+tele'
        >>> Recipe.read(recipe.table()) == recipe
        True
        >>> recipe.changed({"rule.kind": "adaptive", "rule.longest": "3"})
        Traceback (most recent call last):
        metateleport.settings.SettingsError: rule.longest does not go with rule.kind = 'adaptive', which has: hidden, \
cooling, told, guarded
    """

    family: FamilySettings
    rule: RuleSettings = dataclasses.field(default_factory=StepSettings)
    teleport: TeleportSettings | None = dataclasses.field(default_factory=TeleportSettings)
    gauge: GaugeSettings | None = None
    outer: OuterSettings = dataclasses.field(default_factory=TruncatedSettings)
    validation: ValidationSettings = dataclasses.field(default_factory=ValidationSettings)

    def __post_init__(self) -> None:
        shape = self.networks(MetaOptimizerConfig.groups)
        if self.outer.teleport_cost and not shape.teleports:
            raise SettingsError(
                f"outer.teleport_cost = {self.outer.teleport_cost:g} is a price on teleports, and none is learned: "
                "leave it out, or add teleport or gauge"
            )
        if self.outer.told and not self.rule.reads_total:
            raise SettingsError(
                f"outer.told tells the length of a run, and rule.kind = {self.rule.kind!r} makes no use of it: leave "
                "it out"
            )
        if self.outer.meta_steps is not None and self.validation.every > self.outer.meta_steps:
            raise SettingsError(
                f"validation.every = {self.validation.every} is never reached in outer.meta_steps = "
                f"{self.outer.meta_steps}: lower the former or raise the latter"
            )

    @property
    def mode(self) -> str:
        """What is learned, one of `metateleport.learned.MODES`."""
        return self.networks(MetaOptimizerConfig.groups).mode

    def networks(self, groups: tuple[str, ...]) -> MetaOptimizerConfig:
        """The shape of the networks to train; for the step alone it is `networks(groups).without_teleport()`.

        Args:
            groups: names of the groups of the symmetries that the tasks have.
        """
        return MetaOptimizerConfig(self.rule, self.teleport, self.gauge, groups)

    def of_family(self, family: TaskFamily) -> Recipe:
        """The recipe with all settings of its loaded family, defaults included, in their types."""
        return dataclasses.replace(self, family=FamilySettings(self.family.name, family.settings()))

    def table(self) -> dict[str, dict[str, Any]]:
        """All settings as JSON has them, with a table for each part."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part.table() for name, part in parts.items() if part is not None}

    def flat(self) -> dict[str, Any]:
        """All settings by their dotted keys."""
        return flattened(self.table())

    @classmethod
    def read(cls, tables: Mapping[str, Any]) -> Recipe:
        """A recipe from its tables; settings that they leave out have their defaults.

        Raises:
            SettingsError: if a part or a setting is unknown, missing or not allowed, or two do not go together.
        """
        for part, table in tables.items():
            if part not in PARTS:
                raise SettingsError(_unknown(part))
            if not isinstance(table, Mapping):
                raise SettingsError(f"{part} is a table of settings, not {table!r}")
        return cls(
            FamilySettings.read(tables.get("family", {})),
            *read_networks(tables),
            read_outer(tables.get("outer", {})),
            ValidationSettings.read(tables.get("validation", {})),
        )

    def changed(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with some settings changed, as they are written on the command line.

        With another `rule.kind`, `gauge.kind` or `family.name` the part's other settings become the defaults of that
        kind; with another `outer.estimator` those that it has too are kept. `teleport=none` and `gauge=none` remove
        the part; `teleport=default` adds a teleport.

        Args:
            changes: values as text, by dotted key.

        Raises:
            SettingsError: as `read`.
        """
        tables = self.table()
        whole = {key: text for key, text in changes.items() if "." not in key}
        for part, text in whole.items():
            inside = [key for key in changes if key.startswith(f"{part}.")]
            if part not in ("teleport", "gauge"):
                raise SettingsError(
                    f"{part} has settings of its own: give one, as {part}.NAME" if part in PARTS else _unknown(part)
                )
            if text == "none" and not inside:
                tables.pop(part, None)
            elif text == "default" and part == "teleport":
                tables.setdefault(part, {})
            else:
                clash = f"{inside[0]} cannot be set where {part} is left out" if text == "none" else f"not {text!r}"
                allowed = "none or default" if part == "teleport" else "none, and added by gauge.kind"
                raise SettingsError(f"{part} is {allowed}: {clash}")
        names = {"rule": "kind", "gauge": "kind", "family": "name"}
        for part, name in names.items():
            chosen = changes.get(f"{part}.{name}")
            if chosen is not None and tables.get(part, {}).get(name) != chosen:
                tables[part] = {name: Text(chosen)}
        estimator = changes.get("outer.estimator")
        if estimator in ESTIMATORS:
            known = ESTIMATORS[estimator].names()
            tables["outer"] = {name: value for name, value in tables["outer"].items() if name in known}
        for key, text in changes.items():
            part, dot, name = key.partition(".")
            if dot and part not in PARTS:
                raise SettingsError(_unknown(key))
            if dot:
                tables.setdefault(part, {})[name] = Text(text)
        return Recipe.read(tables)


def _unknown(key: str) -> str:
    if key == "mode":
        return "there is no setting mode: it follows from rule.kind and from which of teleport and gauge are present"
    parts: list[type[Settings]] = [TeleportSettings, GaugeSettings, ValidationSettings]
    parts += [*known_rules().values(), *ESTIMATORS.values()]
    known = ["family.name", "rule.kind", "outer.estimator"]
    known += [f"{part.part}.{name}" for part in parts for name in part.names()]
    near = nearest(key, known)
    return f"there is no setting {key}: the nearest is {near}, and those of the task family are family.NAME"


def device_for(name: str) -> torch.device:
    """The device of a name; `auto` is CUDA if there is a GPU, else the CPU.

    Raises:
        TrainingError: if the device is unknown or not present.

    Example:
        >>> device_for("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise TrainingError(f"a device is auto, cpu or cuda; not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("there is no CUDA device here: use --device cpu, or auto")
    return torch.device(name)
