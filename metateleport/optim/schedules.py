"""When to teleport: at given steps, every few steps, when the gradient norm stalls, or when a function says so."""

from __future__ import annotations

import abc
import collections
import math
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["AtSteps", "Calling", "Every", "Schedule", "WhenStalled", "schedule_of"]


class Schedule(abc.ABC):
    """Says before which steps a `TeleportingOptimizer` teleports.

    `due` is called once for each step, right after the step before it, so that the optimizer knows in time which
    forward pass to record; and once more after a state dict was loaded.
    """

    needs_gradient_norm: bool = False
    """Whether `observe` gets the norm of the gradient; otherwise it gets NaN, which costs nothing to compute."""

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether to teleport before a step.

        Args:
            step: number of the step; the first is 0.
        """

    def observe(self, step: int, gradient_norm: float, teleported: bool) -> None:  # noqa: B027
        """Notes a step that was taken; does nothing unless a schedule overrides it.

        Args:
            step: number of the step.
            gradient_norm: norm of the gradient of that step, over all parameters that have one.
            teleported: whether a teleport came right before the step, carried out or refused.
        """

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, as numbers and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            ValueError: if the state is of another schedule.
        """
        if state:
            raise ValueError(f"{self!r} has no state, and the saved one is not empty: it is another schedule's")


class Every(Schedule):
    """Teleports every `steps` steps, from step `start` on.

    Args:
        steps: number of steps from one teleport to the next.
        start: the first step with a teleport.

    Raises:
        ValueError: if `steps` is not a positive integer or `start` not an integer of at least zero.

    Example:
        >>> schedule = Every(5, start=3)
        >>> [step for step in range(20) if schedule.due(step)]
        [3, 8, 13, 18]
    """

    def __init__(self, steps: int, start: int = 0) -> None:
        if not _is_count(steps) or steps < 1:
            raise ValueError(f"every is the number of steps between teleports, an integer of at least 1, not {steps!r}")
        if not _is_count(start):
            raise ValueError(f"start is the number of the first step with a teleport, at least 0, not {start!r}")
        self.steps, self.start = steps, start

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.steps == 0

    def __repr__(self) -> str:
        return f"Every({self.steps}{f', start={self.start}' if self.start else ''})"


class AtSteps(Schedule):
    """Teleports at the given steps and at no others.

    Args:
        steps: their numbers; the first step is 0.

    Raises:
        ValueError: if there are none, or one is not an integer of at least zero.

    Example:
        >>> schedule = AtSteps([0, 10])
        >>> [step for step in range(20) if schedule.due(step)]
        [0, 10]

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), algorithm 1, the index set K of teleportation steps.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        given = list(steps)
        wrong = [step for step in given if not _is_count(step)]
        if wrong or not given:
            raise ValueError(
                f"the steps to teleport at are integers of at least 0, not {wrong[0] if wrong else given!r}"
            )
        self.steps = frozenset(given)

    def due(self, step: int) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"AtSteps({sorted(self.steps)})"


class WhenStalled(Schedule):
    r"""Teleports when the norm of the gradient has stopped falling.

    With $n$ the norms of the last `window` steps, a teleport is due once

    $$1 - \frac{\text{mean of the later half of } n}{\text{mean of the earlier half of } n} < \text{threshold}.$$

    Halves are compared and not single steps, so that the noise of minibatches averages out. A teleport starts the
    window anew, since the gradients before and after it differ. A refused teleport does so too, so that it is not
    tried again at every step. The next teleport comes after `window` or `cooldown` steps at the earliest.

    Args:
        window: number of steps to compare, at least 2.
        threshold: smallest relative decrease that counts as progress; negative to wait until the norm rises.
        cooldown: smallest number of steps from one teleport to the next.

    Raises:
        ValueError: if the window or the cooldown is too small, or the threshold is not below 1.

    Example:
        >>> schedule = WhenStalled(window=4, threshold=0.1, cooldown=6)
        >>> due = []
        >>> for step, norm in enumerate([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]):
        ...     due.append(schedule.due(step))
        ...     schedule.observe(step, norm, teleported=False)
        >>> due.index(True)
        7
    """

    needs_gradient_norm = True

    def __init__(self, window: int = 20, threshold: float = 0.05, cooldown: int = 0) -> None:
        if not _is_count(window) or window < 2:
            raise ValueError(f"the window is a number of steps, at least 2, not {window!r}")
        if not _is_count(cooldown):
            raise ValueError(f"the cooldown is a number of steps, at least 0, not {cooldown!r}")
        if not threshold < 1:
            raise ValueError(f"the threshold is a relative decrease and lies below 1, it is {threshold!r}")
        self.window, self.threshold, self.cooldown = window, threshold, cooldown
        self._norms: collections.deque[float] = collections.deque(maxlen=window)
        self._last: int | None = None

    def due(self, step: int) -> bool:
        if len(self._norms) < self.window or (self._last is not None and step - self._last < self.cooldown):
            return False
        half = self.window // 2
        norms = list(self._norms)
        earlier, later = sum(norms[:half]), sum(norms[-half:])
        return later > (1 - self.threshold) * earlier

    def observe(self, step: int, gradient_norm: float, teleported: bool) -> None:
        if teleported:
            self._norms.clear()
            self._last = step
        if math.isfinite(gradient_norm):
            self._norms.append(gradient_norm)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != {"norms", "last"}:
            raise ValueError(f"the saved state is not that of {self!r}: it was saved with another schedule")
        self._norms = collections.deque(state["norms"], maxlen=self.window)
        self._last = state["last"]

    def __repr__(self) -> str:
        return f"WhenStalled(window={self.window}, threshold={self.threshold}, cooldown={self.cooldown})"


class Calling(Schedule):
    """Teleports when a function of the step's number returns true; `schedule=` takes the bare function too.

    Args:
        function: called once for each step with its number; the first is 0.

    Example:
        >>> Calling(lambda step: step in (1, 2, 4, 8)).due(4)
        True
    """

    def __init__(self, function: Callable[[int], bool]) -> None:
        if not callable(function):
            raise TypeError(f"a schedule is a metateleport.optim.Schedule or a function of the step, not {function!r}")
        self.function = function

    def due(self, step: int) -> bool:
        return bool(self.function(step))

    def __repr__(self) -> str:
        return f"Calling({getattr(self.function, '__name__', self.function)})"


def schedule_of(every: int | None, schedule: Schedule | Callable[[int], bool] | None) -> Schedule:
    """The schedule given by `every` or by `schedule`; every ten steps if neither is given.

    Raises:
        TypeError: if the schedule is neither a `Schedule` nor callable.
        ValueError: if both are given, or `every` is not a number of steps.
    """
    if schedule is None:
        return Every(10 if every is None else every)
    if every is not None:
        raise ValueError(f"give every={every!r} or schedule={schedule!r}, not both")
    return schedule if isinstance(schedule, Schedule) else Calling(schedule)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
