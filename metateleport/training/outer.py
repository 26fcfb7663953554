"""The settings of the outer loop: one class for each estimator of the meta-gradient."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from metateleport.settings import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    Settings,
    SettingsError,
    nearest,
    setting,
)

__all__ = [
    "ESTIMATORS",
    "EvolutionSettings",
    "OuterSettings",
    "PersistentSettings",
    "TruncatedSettings",
    "WindowedSettings",
    "read_outer",
]


_GOLDEN = (math.sqrt(5) - 1) / 2

_UNTOLD = 4
"""One stack of so many is not told the length of its runs."""


@dataclasses.dataclass(frozen=True)
class OuterSettings(Settings, abc.ABC):
    """The outer loop: how the networks are trained, by whichever estimator of the meta-gradient.

    Args:
        meta_steps: number of meta-steps for each network; None if the time ends the training.
        seconds: stop after so many seconds, if that is sooner; shared by the networks.
        tasks: number of tasks in a stack, over all processes together.
        horizon: inner steps on each task.
        lr: step size of Adam on the networks; a cosine anneals it to a tenth.
        clip: largest norm of the meta-gradient.
        blind: share of the windows in which the networks see no loss, in [0, 1], so that they learn to work in training
            loops that do not tell it.
        late: share of a window's losses, at its end, that the meta-loss is the mean of, and of a horizon's that the
            score is. With all of them networks learn to be quick in the window under way; with the last ones to be
            far at its end.
        unseen: share of the loss on held-out data at the end of a window, in the meta-loss and in the score, in [0, 1].
            Networks that are trained for the training loss alone learn to be quick where it overfits.
        told: whether the networks are told how long a run is, in three stacks of four, if their rule makes use of it.
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
    estimator: ClassVar[str] = ""

    meta_steps: int | None = setting(300, AT_LEAST_ONE, 10**9)
    seconds: float | None = setting(None, POSITIVE, 1e9)
    tasks: int = setting(16, AT_LEAST_ONE, 10**6)
    horizon: int = setting(30, AT_LEAST_ONE, 10**9)
    lr: float = setting(5e-3, POSITIVE, 1e6)
    clip: float = setting(1.0, POSITIVE)
    blind: float = setting(0.5, Range("a share of the windows, in [0, 1]", lambda value: 0 <= value <= 1))
    late: float = setting(1.0, Range("a share of the losses, above 0 and at most 1", lambda value: 0 < value <= 1))
    unseen: float = setting(0.0, Range("a share of the meta-loss, in [0, 1]", lambda value: 0 <= value <= 1))
    told: bool = setting(False)
    teleport_cost: float = setting(0.0, NOT_NEGATIVE, 1e6)
    search: int = setting(0, NOT_NEGATIVE, 10**6)
    starts: int = setting(1, AT_LEAST_ONE, 10**4)
    start_from: str | None = setting(None)
    seed: int = setting(0, Range("a whole number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63))
    device: Literal["auto", "cpu", "cuda"] = setting("auto")
    dtype: Literal["float32", "float64"] | None = setting(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_from is not None and self.starts > 1:
            raise SettingsError(
                f"outer.starts = {self.starts} asks for random networks, and outer.start_from for those of a "
                "checkpoint: use one of the two"
            )
        if self.meta_steps is None and self.seconds is None:
            raise SettingsError("outer.meta_steps and outer.seconds are both none, and one has to end the training")

    @property
    def window(self) -> int:
        """Inner steps between two meta-steps."""
        return self.horizon

    def windows(self, share: float) -> int:
        """Number of meta-steps that a stack is followed for.

        Args:
            share: share of the training that is done.
        """
        return 1

    def length(self, stack: int, share: float) -> int:
        """Inner steps that a stack is followed for.

        Args:
            stack: number of the stack.
            share: share of the training that is done.
        """
        return self.window * self.windows(share)

    def scored(self, stack: int, stacks: int, most: int) -> int:
        """Inner steps that a stack of a score is followed for.

        Args:
            stack: its number.
            stacks: number of all stacks of the score.
            most: inner steps that there is time for.
        """
        return most

    def total(self, stack: int, steps: int) -> int | None:
        """The length of a run that the networks are told; None where they are not.

        Args:
            stack: number of the stack.
            steps: number of inner steps of the run.
        """
        return steps if self.told and stack % _UNTOLD != _UNTOLD - 1 else None

    def last(self, steps: int) -> int:
        """How many losses of so many inner steps count."""
        return max(1, round(self.late * steps))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the tasks; None for the family's own."""
        return None if self.dtype is None else {"float32": torch.float32, "float64": torch.float64}[self.dtype]

    def table(self) -> dict[str, Any]:
        return {"estimator": self.estimator, **super().table()}


@dataclasses.dataclass(frozen=True)
class WindowedSettings(OuterSettings, abc.ABC):
    """The outer loop of an estimator that follows a stack from window to window, with a meta-step after each.

    Args:
        unroll: inner steps of one window.
    """

    unroll: int = setting(10, AT_LEAST_ONE, 10**6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < self.unroll:
            raise SettingsError(
                f"outer.horizon = {self.horizon} is shorter than one window, outer.unroll = {self.unroll}: raise the "
                "horizon or shorten the window"
            )

    @property
    def window(self) -> int:
        return self.unroll

    def windows(self, share: float) -> int:
        return max(1, round(self.horizon / self.unroll))


@dataclasses.dataclass(frozen=True)
class TruncatedSettings(WindowedSettings):
    """Truncated backpropagation: the meta-gradient through one window at a time (`tbptt`).

    A curriculum begins with one window and reaches the horizon after half of the run. What a step does beyond its
    window is not seen: where the best short run is another than the best long one, training leads to the former.

    Args:
        first_order: leave the derivative of the inner gradients out of the meta-gradient.
        tasks_at_once: number of a process's tasks that are followed in one graph; None for all. The meta-gradient is
            then added up over parts of the stack, and the memory is that of one part.

    Example:
        >>> [TruncatedSettings(unroll=10, horizon=30).windows(share) for share in (0.0, 0.25, 0.5)]
        [1, 2, 3]
    """

    estimator: ClassVar[str] = "tbptt"

    first_order: bool = setting(False)
    tasks_at_once: int | None = setting(None, AT_LEAST_ONE, 10**6)

    def windows(self, share: float) -> int:
        return max(1, round(1 + (self.horizon / self.unroll - 1) * min(1.0, 2 * share)))


@dataclasses.dataclass(frozen=True)
class EvolutionSettings(OuterSettings):
    """Evolution strategies: differences of the meta-loss of a whole horizon between pairs of networks (`es`).

    One meta-step for each stack, without a graph; see `metateleport.training.evolution`.

    A curriculum over length: where the shortest run is shorter than the horizon, each stack has a length of its own,
    spread evenly in its logarithm from the shortest to a longest one, which grows to the horizon over the first half of
    the training. Scores are means over lengths from the shortest to the horizon.

    Args:
        spread: standard deviation of the perturbations of each weight.
        shortest: inner steps of the shortest runs; None where all are as long as the horizon.

    Example:
        >>> EvolutionSettings(horizon=1000).window
        1000
        >>> curriculum = EvolutionSettings(horizon=500, shortest=20)
        >>> [curriculum.length(stack, share) for share in (0.0, 0.25, 1.0) for stack in range(3)]
        [20, 20, 20, 20, 54, 29, 20, 146, 43]
    """

    estimator: ClassVar[str] = "es"

    spread: float = setting(0.02, POSITIVE, 1e6)
    shortest: int | None = setting(None, AT_LEAST_ONE, 10**9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest is not None and self.shortest > self.horizon:
            raise SettingsError(
                f"outer.shortest = {self.shortest} is longer than outer.horizon = {self.horizon}, the longest run: "
                "lower the former or raise the latter"
            )

    def length(self, stack: int, share: float) -> int:
        if self.shortest is None:
            return self.horizon
        longest = math.log(self.horizon / self.shortest) * min(1.0, 2 * share)
        # Multiples of the golden ratio lie evenly, however many there are of them.
        return round(self.shortest * math.exp(longest * (stack * _GOLDEN % 1.0)))

    def scored(self, stack: int, stacks: int, most: int) -> int:
        if self.shortest is None or stacks < 2:
            return most
        shortest = min(self.shortest, most)
        return round(shortest * (most / shortest) ** (stack / (stacks - 1)))


@dataclasses.dataclass(frozen=True)
class PersistentSettings(WindowedSettings):
    """Persistent evolution strategies: differences window by window, without the bias of truncation (`pes`).

    A stack is followed to the horizon from the first meta-step on, without a graph; see
    `metateleport.training.evolution`.

    Args:
        spread: standard deviation of the perturbations of each weight.

    Example:
        >>> PersistentSettings(unroll=20, horizon=1000).windows(0.0)
        50
    """

    estimator: ClassVar[str] = "pes"

    spread: float = setting(0.02, POSITIVE, 1e6)


ESTIMATORS: dict[str, type[OuterSettings]] = {
    kind.estimator: kind for kind in (TruncatedSettings, EvolutionSettings, PersistentSettings)
}
"""The settings of the outer loop by the name of their estimator."""


def read_outer(table: Mapping[str, Any]) -> OuterSettings:
    """The settings of the outer loop.

    Args:
        table: `estimator`, which is `tbptt` if it is left out, and settings that go with it.

    Returns:
        The settings.

    Raises:
        SettingsError: if the estimator or a setting is unknown, a value is not allowed, or they do not go together.

    Example:
        >>> read_outer({"estimator": "pes", "first_order": True})
        Traceback (most recent call last):
        metateleport.settings.SettingsError: outer.first_order does not go with outer.estimator = 'pes'; it goes with \
'tbptt'
    """
    own = dict(table)
    name = str(own.pop("estimator", TruncatedSettings.estimator))
    if name not in ESTIMATORS:
        raise SettingsError(f"outer.estimator is one of {', '.join(ESTIMATORS)}; not {name!r}")
    for key in own:
        if key in ESTIMATORS[name].names():
            continue
        others = [f"{each!r}" for each, kind in ESTIMATORS.items() if key in kind.names()]
        if others:
            raise SettingsError(
                f"outer.{key} does not go with outer.estimator = {name!r}; it goes with {' and '.join(others)}"
            )
        near = nearest(key, (*ESTIMATORS[name].names(), "estimator"))
        raise SettingsError(f"there is no setting outer.{key}: the nearest is outer.{near}")
    return ESTIMATORS[name].read(own)
