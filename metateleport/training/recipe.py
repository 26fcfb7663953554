"""Recipes: all settings of a meta-training in nested tables, which refuse settings that do not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from metateleport.families import TaskFamily
from metateleport.learned.config import MetaOptimizerConfig, read_networks
from metateleport.learned.parts import GaugeSettings, TeleportSettings
from metateleport.learned.rules import RuleSettings, StepSettings, known_rules
from metateleport.settings import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    Settings,
    SettingsError,
    Text,
    flattened,
    nearest,
    setting,
)

__all__ = ["FamilySettings", "OuterSettings", "Recipe", "TrainingError", "ValidationSettings", "device_for"]

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
class OuterSettings(Settings):
    """The outer loop: how the networks are trained.

    Args:
        meta_steps: number of meta-steps for each network; None if the time ends the training.
        seconds: stop after so many seconds, if that is sooner; shared by the networks.
        tasks: number of tasks in a stack.
        unroll: inner steps of one truncated window; each window gives one meta-step.
        horizon: inner steps on each task at the end of the curriculum, which begins with one window.
        lr: step size of Adam on the networks; a cosine anneals it to a tenth.
        clip: largest norm of the meta-gradient.
        first_order: leave the derivative of the inner gradients out of the meta-gradient.
        blind: share of the windows in which the networks see no loss, in [0, 1], so that they learn to work in training
            loops that do not tell it.
        teleport_cost: price on teleports that stay and on gauges, so that they close where they bring too little. The
            meta-loss is the mean log loss plus this times the mean `metateleport.training.cost.openness`, which is
            between 0 and 1: a teleport that is wide open at every step has to lower the mean log loss by as much.
        search: rounds of an evolution strategy, before the meta-steps, on the networks' output biases; zero to start
            from biases that serve most families.
        starts: number of random initialisations; each is tried for a third of the meta-steps, and the best on
            validation goes on.
        start_from: a checkpoint to start from, from its networks of the same meta-seed if it has them; None for random
            networks.
        seed: seeds the networks and the tasks.
        device: `auto`, `cpu` or `cuda`.
        dtype: of the tasks; None for the family's own.
    """

    part: ClassVar[str] = "outer"

    meta_steps: int | None = setting(300, AT_LEAST_ONE, 10**9)
    seconds: float | None = setting(None, POSITIVE, 1e9)
    tasks: int = setting(16, AT_LEAST_ONE, 10**6)
    unroll: int = setting(10, AT_LEAST_ONE, 10**6)
    horizon: int = setting(30, AT_LEAST_ONE, 10**9)
    lr: float = setting(5e-3, POSITIVE, 1e6)
    clip: float = setting(1.0, POSITIVE, 1e12)
    first_order: bool = setting(False)
    blind: float = setting(0.5, Range("a share of the windows, in [0, 1]", lambda value: 0 <= value <= 1))
    teleport_cost: float = setting(0.0, NOT_NEGATIVE, 1e6)
    search: int = setting(0, NOT_NEGATIVE, 10**6)
    starts: int = setting(1, AT_LEAST_ONE, 10**4)
    start_from: str | None = setting(None)
    seed: int = setting(0, Range("a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63))
    device: Literal["auto", "cpu", "cuda"] = setting("auto")
    dtype: Literal["float32", "float64"] | None = setting(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < self.unroll:
            raise SettingsError(
                f"outer.horizon = {self.horizon} is shorter than one window, outer.unroll = {self.unroll}: raise the "
                "horizon or shorten the window"
            )
        if self.start_from is not None and self.starts > 1:
            raise SettingsError(
                f"outer.starts = {self.starts} asks for random networks, and outer.start_from for those of a "
                "checkpoint: use one of the two"
            )
        if self.meta_steps is None and self.seconds is None:
            raise SettingsError("outer.meta_steps and outer.seconds are both none, and one has to end the training")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the tasks; None for the family's own."""
        return None if self.dtype is None else {"float32": torch.float32, "float64": torch.float64}[self.dtype]


@dataclasses.dataclass(frozen=True)
class ValidationSettings(Settings):
    """How the networks of the checkpoint are chosen.

    Args:
        tasks: number of validation tasks.
        every: meta-steps between validations; the last one is always at the end.
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
cooling
    """

    family: FamilySettings
    rule: RuleSettings = dataclasses.field(default_factory=StepSettings)
    teleport: TeleportSettings | None = dataclasses.field(default_factory=TeleportSettings)
    gauge: GaugeSettings | None = None
    outer: OuterSettings = dataclasses.field(default_factory=OuterSettings)
    validation: ValidationSettings = dataclasses.field(default_factory=ValidationSettings)

    def __post_init__(self) -> None:
        shape = self.networks(MetaOptimizerConfig.groups)
        if self.outer.teleport_cost and not shape.teleports:
            raise SettingsError(
                f"outer.teleport_cost = {self.outer.teleport_cost:g} is a price on teleports, and none is learned: "
                "leave it out, or add teleport or gauge"
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
            OuterSettings.read(tables.get("outer", {})),
            ValidationSettings.read(tables.get("validation", {})),
        )

    def changed(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with some settings changed, as they are written on the command line.

        With another `rule.kind`, `gauge.kind` or `family.name` the part's other settings become the defaults of that
        kind. `teleport=none` and `gauge=none` remove the part; `teleport=default` adds a teleport.

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
    parts: list[type[Settings]] = [TeleportSettings, GaugeSettings, OuterSettings, ValidationSettings]
    parts += known_rules().values()
    known = ["family.name", "rule.kind", *(f"{part.part}.{name}" for part in parts for name in part.names())]
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
