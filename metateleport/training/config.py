"""Settings of a meta-training run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch

from metateleport.learned.meta_optimizer import GAUGES, UPDATES, GaugeKind, MetaOptimizerConfig, Mode, UpdateSize
from metateleport.learned.rules import BASES

__all__ = ["TrainConfig", "TrainingError", "default_settings", "device_for"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "network": ("equivariant", "flat"),
    "base": BASES,
    "gauge": GAUGES,
    "update": UPDATES,
    "device": ("auto", "cpu", "cuda"),
    "dtype": (None, "float32", "float64"),
}


class TrainingError(ValueError):
    """Settings of a meta-training run that cannot work; the message says why."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a meta-training run; written into the checkpoint's card.

    Args:
        family: the task family's bare name or path.
        settings: its settings.
        mode: what is learned, one of `metateleport.learned.MODES`.
        network: `equivariant`, or `flat` for the source paper's networks.
        meta_steps: number of meta-steps (updates of the networks), for each of the networks trained.
        seconds: stop after so many seconds, if sooner; shared by the networks trained.
        tasks: tasks stacked in one graph.
        unroll: inner steps of one truncated window; each gives one meta-step.
        horizon: inner steps that tasks are followed for at the end of the curriculum; it starts at one window.
        lr: step size of Adam on the networks, annealed to a tenth by a cosine.
        clip: largest norm of the meta-gradient.
        first_order: leave the derivative of the inner gradients out of the meta-gradient.
        validation_tasks: tasks that the checkpoint is chosen on.
        validation_every: meta-steps between validations.
        search: rounds of an evolution strategy, before the meta-steps, on the constants that the networks put out at
            the start; zero to start from constants that serve most families.
        starts: initialisations that are tried for a third of the meta-steps; the best on validation goes on.
        start_from: a checkpoint whose networks the training starts from, those of the same meta-seed where it has them;
            None for random ones.
        hidden: units of the LSTMs.
        stays: learn a teleport that stays, in a mode with `tele`.
        gauge: learn a gauge for each tensor, undone after the step: `none`, `exact` (along exact symmetries) or
            `linearised` (also along pairs of linear layers with an activation between them).
        metric_memory: of the running mean that a gauge's metric is on minibatches, in [0, 1): long against their noise,
            short where the metric moves with the weights, as along the factors of a product.
        secants: number of secant pairs that are built around the learned step where all data are seen.
        longest: the longest step in units of the joint curvature bound, above one: short where a gauge makes the bound
            tight, so that training does not answer to what a gauge leaves uneven by longer steps.
        cooling: how fast steps on minibatches get shorter once the loss is down to its noise, at the start of training,
            or, of the update `adaptive`, how fast they get shorter with time; zero for not at all.
        teleport_cost: price on teleports that stay and on gauges, so that they close where they do not pay. The
            meta-loss is the mean log loss plus this times the mean `metateleport.training.cost.openness`, which is
            between 0 and 1: a teleport that is wide open at every step has to lower the mean log loss by as much.
        max_stretch: the largest factor by which all teleports that stay may together stretch or shrink anything, above
            one, so that they do not lead ever further along the orbit; None for no bound.
        update: of the modes that learn one: `coordinate`, `tensor` for large models, `adaptive` for minibatches.
        blind: share of the windows of meta-training in which the networks see no loss, in [0, 1]: they have to do
            without where a training loop gives none.
        base: optimizer of mode `tele`.
        base_lr: its step size.
        seed: seeds the networks and the tasks.
        device: `auto`, `cpu` or `cuda`.
        dtype: of the tasks, `float32` or `float64`; the family's own if not given.

    Raises:
        TrainingError: if a value cannot work.

    Example:
        >>> TrainConfig("leaky_mlp", horizon=5)
        Traceback (most recent call last):
        metateleport.training.config.TrainingError: a horizon of 5 inner steps is shorter than one unroll of 10: \
raise the horizon or shorten the unroll
    """

    family: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    mode: Mode = "lr+tele"
    network: Literal["equivariant", "flat"] = "equivariant"
    meta_steps: int = 300
    seconds: float | None = None
    tasks: int = 16
    unroll: int = 10
    horizon: int = 30
    lr: float = 5e-3
    clip: float = 1.0
    first_order: bool = False
    validation_tasks: int = 32
    validation_every: int = 20
    search: int = 0
    starts: int = 1
    start_from: str | None = None
    hidden: int = 32
    stays: bool = True
    gauge: GaugeKind = "none"
    metric_memory: float = 0.95
    secants: int = 0
    longest: float = 1.5
    cooling: float = 0.0
    teleport_cost: float = 0.0
    max_stretch: float | None = None
    update: UpdateSize = "coordinate"
    blind: float = 0.5
    base: str = "sgd"
    base_lr: float = 1e-3
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                allowed = ", ".join(str(each) for each in known if each is not None)
                raise TrainingError(f"{name} is one of {allowed}; not {getattr(self, name)!r}")
        try:
            # Which symmetries and shapes there are is known once tasks are drawn; all else is checked here.
            shape = self.meta_optimizer_config(shapes=(("", ()),))
        except ValueError as error:
            raise TrainingError(str(error)) from None
        for name in (
            "meta_steps",
            "tasks",
            "unroll",
            "horizon",
            "validation_tasks",
            "validation_every",
            "starts",
            "hidden",
        ):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} has to be at least 1, not {getattr(self, name)}")
        if self.horizon < self.unroll:
            raise TrainingError(
                f"a horizon of {self.horizon} inner steps is shorter than one unroll of {self.unroll}: "
                "raise the horizon or shorten the unroll"
            )
        if not (self.lr > 0 and self.clip > 0 and self.base_lr > 0):
            raise TrainingError(f"lr, clip and base_lr have to be positive: {self.lr}, {self.clip}, {self.base_lr}")
        self._check_cost(shape)
        self._check_stretch(shape)
        self._check_search()
        if self.start_from is not None and self.starts > 1:
            raise TrainingError("several starts are random ones: use starts=1 to start from a checkpoint")
        if self.seconds is not None and not self.seconds > 0:
            raise TrainingError(f"seconds has to be positive, not {self.seconds}")
        if not 0 <= self.blind <= 1:
            raise TrainingError(f"blind is a share of the windows, in [0, 1]; not {self.blind!r}")
        if self.seed < 0:
            raise TrainingError(f"a seed is not negative: {self.seed}")

    def _check_cost(self, shape: MetaOptimizerConfig) -> None:
        if not (math.isfinite(self.teleport_cost) and self.teleport_cost >= 0):
            raise TrainingError(f"teleport_cost has to be a number of at least 0, not {self.teleport_cost!r}")
        if self.teleport_cost and not shape.teleports:
            raise TrainingError(
                f"mode {self.mode!r} learns no teleport that could cost anything: leave teleport_cost out, or train a "
                "mode with tele"
            )
        if self.teleport_cost and self.network == "flat":
            raise TrainingError(
                "the flat networks teleport by one fixed size and have no gate to close: leave teleport_cost out"
            )

    def _check_stretch(self, shape: MetaOptimizerConfig) -> None:
        if self.max_stretch is not None and not (self.stays and shape.teleports):
            raise TrainingError("max_stretch bounds teleports that stay, and none is learned here: leave it out")

    def _check_search(self) -> None:
        if self.search < 0:
            raise TrainingError(f"search is a number of rounds, zero for none; not {self.search}")
        if self.search and self.network == "flat":
            raise TrainingError(
                "the flat networks put out a number for every coordinate, which are no constants to search: leave "
                "search out"
            )

    def meta_optimizer_config(
        self,
        groups: tuple[str, ...] = MetaOptimizerConfig.groups,
        shapes: tuple[tuple[str, tuple[int, ...]], ...] = (),
    ) -> MetaOptimizerConfig:
        """The shape of the networks to train.

        Args:
            groups: of the symmetries that the tasks have.
            shapes: of their parameters, for the flat networks.

        Returns:
            The shape; of the recipe without teleports it is its `without_teleport()`.

        Raises:
            ValueError: if the settings do not go together.

        Example:
            >>> TrainConfig("leaky_mlp", mode="lr").meta_optimizer_config().teleports
            False
        """
        return MetaOptimizerConfig(
            mode=self.mode,
            network=self.network,
            hidden=self.hidden,
            groups=groups,
            shapes=shapes,
            base=self.base,
            base_lr=self.base_lr,
            max_stretch=self.max_stretch,
            stays=self.stays,
            gauge=self.gauge,
            metric_memory=self.metric_memory,
            secants=self.secants,
            longest=self.longest,
            cooling=self.cooling,
            update=self.update,
        )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the tasks; None for the family's own."""
        return None if self.dtype is None else {"float32": torch.float32, "float64": torch.float64}[self.dtype]


def default_settings() -> dict[str, Any]:
    """The settings that have a default, by name, as a card has them.

    A card that does not have one was written by a version that did not know it, and trained as the default does; but
    such a version hid no losses.

    Returns:
        The defaults, but for seed and device, which are no part of a recipe.

    Example:
        >>> default_settings()["search"]
        0
    """
    known = {**{field.name: field.default for field in dataclasses.fields(TrainConfig)}, "blind": 0.0}
    return {
        name: value
        for name, value in known.items()
        if value is not dataclasses.MISSING and name not in ("seed", "device")
    }


def device_for(name: str) -> torch.device:
    """The device of a name: `auto` is CUDA where there is one.

    Raises:
        TrainingError: if the device is unknown or not there.

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
