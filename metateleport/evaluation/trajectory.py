"""The interface of an evaluation's methods, and the recorder that counts their evaluations."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import dataclasses
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metateleport.evaluation.lost import where
from metateleport.evaluation.marks import marks
from metateleport.families import TaskStack
from metateleport.families.stack import Batch

__all__ = ["Method", "Recorder", "Trajectory", "ends_only", "every_so_often", "output_drift", "reproducible"]

Array = npt.NDArray[np.float64]

# Costs are sums of thirds: rounding must not push a sum over a whole number.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Losses of a stack of tasks on the grid 0, 1, ..., budget of gradient evaluations.

    Index k has the loss at the task's last accepted point that cost at most k evaluations; index 0 is the start.

    Args:
        loss: the measure that tasks are judged by, their full training loss or another one, `(tasks, budget + 1)`,
            float64; not finite if a task has diverged.
        seconds: wall-clock seconds of the method on the whole stack, without the passes that are made for the report.
        seconds_along: seconds when the tasks' points were reached, mean over tasks, `(budget + 1,)`.
        held_out_loss: loss on each task's held-out data, in the form of `loss`, if there are such data.
        held_out_accuracy: accuracy on each task's held-out data, in the form of `loss`, if the tasks have a score.
        drift_max: largest relative change of the outputs by a teleport; None if none was measured.
    """

    loss: Array
    seconds: float
    seconds_along: Array
    held_out_loss: Array | None = None
    held_out_accuracy: Array | None = None
    drift_max: float | None = None

    @property
    def diverged(self) -> npt.NDArray[np.bool_]:
        """Tasks whose loss was not finite at some point, or is above the start at the end, `(tasks,)`."""
        return ~np.isfinite(self.loss).all(1) | ~(self.loss[:, -1] <= self.loss[:, 0])


class Method(abc.ABC):
    """A way to optimise a stack of tasks within a number of gradient evaluations.

    `name` is its name in tables and files; `settings` are its settings; `tuning` says how they were found (None without
    tuning); `teleports` says whether it uses group elements, and `moves_by` how: by a teleport that `stays`, by a gauge
    that is `undone` after the step, by `both`, or `none`; `stacked` says whether it steps all tasks at once, which its
    seconds depend on.
    """

    name: str
    teleports: ClassVar[bool] = False
    moves_by: str = "none"
    stacked: bool = True

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.settings: dict[str, Any] = dict(settings or {})
        self.tuning: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """All that the method's result depends on, as plain values: by default its class, name and settings.

        A method that depends on more has to add it: kept runs are found by this.
        """
        return {"class": type(self).__qualname__, "name": self.name, "settings": self.settings}

    @abc.abstractmethod
    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        """Optimises every task of the stack from its start; the stack is not changed.

        Args:
            stack: the tasks.
            budget: gradient evaluations that each task may spend.

        Returns:
            The trajectory, made by a `Recorder`.
        """


_ends_only: contextvars.ContextVar[bool] = contextvars.ContextVar("ends_only", default=False)
_held_out: contextvars.ContextVar[bool] = contextvars.ContextVar("held_out", default=True)
_every: contextvars.ContextVar[int] = contextvars.ContextVar("every", default=1)

_starts: weakref.WeakKeyDictionary[TaskStack, tuple[Any, dict[str, Array]]] = weakref.WeakKeyDictionary()
"""What was measured at the start of a stack, which all methods have in common, and what it was measured of."""


@contextlib.contextmanager
def ends_only(held_out: bool = True) -> Iterator[None]:
    """Inside the block recorders measure only the start and the end; between them a trajectory keeps its first value.

    Tuning reads no more, and on minibatches the passes for the report cost more than the steps.

    Args:
        held_out: whether held-out data are measured too.
    """
    tokens = _ends_only.set(True), _held_out.set(held_out)
    try:
        yield
    finally:
        _ends_only.reset(tokens[0])
        _held_out.reset(tokens[1])


@contextlib.contextmanager
def every_so_often(evaluations: int) -> Iterator[None]:
    """Inside the block recorders measure every so many gradient evaluations, at the marks and at the end.

    Between them a trajectory keeps the last value that was measured.

    Args:
        evaluations: between two measurements.
    """
    token = _every.set(evaluations)
    try:
        yield
    finally:
        _every.reset(token)


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside the block torch's random numbers, as those of dropout, are the same in every run."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


class Recorder:
    """Counts the gradient evaluations of each task and records the losses at the points that it reached.

    A method that tests its points records a point once it is accepted, at the number of evaluations spent by then.

    Args:
        stack: the tasks, at their start.
        budget: gradient evaluations that each task may spend.

    Raises:
        ValueError: if the budget is not at least one.

    Example:
        >>> from torch import nn
        >>> from metateleport.families import Task, TaskStack
        >>> x = torch.ones(4, 1)
        >>> stack = TaskStack([Task(nn.Linear(1, 1), nn.functional.mse_loss, (x,), (x,)) for _ in range(2)])
        >>> recorder = Recorder(stack, budget=3)
        >>> recorder.charge(torch.tensor([1.0, 4 / 3]))
        >>> recorder.record({name: value * 0 for name, value in stack.tensors().items()})
        >>> loss = recorder.trajectory().loss
        >>> loss[0, 1:].tolist(), (loss[1, 1:] - loss[1, 0] == 0).tolist()
        ([1.0, 1.0, 1.0], [True, False, False])
    """

    def __init__(self, stack: TaskStack, budget: int) -> None:
        if budget < 1:
            raise ValueError(f"a method needs at least one gradient evaluation to spend, not {budget!r}")
        self.stack, self.budget = stack, budget
        self.spent = torch.zeros(len(stack), dtype=torch.float64)
        self._drift: float | None = None
        self._grid = np.arange(budget + 1, dtype=np.float64)
        self._with_held_out = _held_out.get()
        start = self._at_start()
        self._values = {name: np.repeat(values[:, None], budget + 1, axis=1) for name, values in start.items()}
        self._reached = np.zeros((len(stack), budget + 1))
        self._end: dict[str, Tensor] | None = None
        self._ends_only, self._every = _ends_only.get(), _every.get()
        self._measured = 0
        self._paused = 0.0
        self._began = self._now()

    def affords(self, cost: float = 1.0) -> Tensor:
        """Which tasks can still spend `cost`, boolean `(tasks,)`, on the CPU."""
        return self.spent + cost <= self.budget + _ROUNDING

    def charge(self, cost: float | Tensor) -> None:
        """Adds gradient evaluations, one number or `(tasks,)`, to those that each task has spent."""
        self.spent = self.spent + (cost.detach().cpu().double() if isinstance(cost, Tensor) else cost)

    def record(self, parameters: Mapping[str, Tensor], accepted: Tensor | None = None) -> None:
        """Records the tasks' points at the evaluations that they have spent.

        Args:
            parameters: stacked, by name.
            accepted: boolean `(tasks,)`; tasks where it is false stay at their last accepted point.
        """
        with self.untimed() as now:
            reached = self._grid[None] >= self.spent.numpy()[:, None] - _ROUNDING
            if accepted is not None:
                reached &= accepted.detach().cpu().numpy()[:, None]
            if not reached.any():
                return
            if self._ends_only:
                self._keep(parameters, torch.from_numpy(reached[:, -1]).to(self.stack.device))
                return
            if not self._is_due():
                return
            for name, values in self._measure(parameters).items():
                self._values[name] = np.where(reached, values[:, None], self._values[name])
            self._reached[reached] = now

    def _is_due(self) -> bool:
        """Whether it is time to measure again: so many evaluations have passed, or a mark or the end is reached."""
        if self._every == 1:
            return True
        spent = int(float(self.spent.max()) + _ROUNDING)
        passed = spent // self._every + sum(spent >= mark for mark in marks(self.budget))
        if passed == self._measured and bool(self.affords().all()):
            return False
        self._measured = passed
        return True

    def drift(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], batch: Batch, where: Tensor | None = None
    ) -> Tensor:
        """Measures by how much a teleport changed the outputs on its batch; this is not counted.

        Args:
            before: stacked parameters before the teleport.
            after: stacked parameters after the teleport.
            batch: the batch that the teleport was computed on.
            where: tasks to include in `drift_max`, boolean `(tasks,)`; all if not given.

        Returns:
            The relative change, `(tasks,)`.
        """
        with self.untimed():
            drift = output_drift(self.stack, before, after, batch)
            counted = (self.spent <= self.budget + _ROUNDING).to(drift.device)
            counted = counted if where is None else counted & where
            self._drift = max(self._drift or 0.0, float(torch.where(counted, drift, 0.0).max()))
        return drift

    @contextlib.contextmanager
    def untimed(self) -> Iterator[float]:
        """Stops the clock for passes that are made for the report; yields the seconds so far."""
        paused = self._now()
        try:
            yield paused - self._began - self._paused
        finally:
            self._paused += self._now() - paused

    def trajectory(self) -> Trajectory:
        """The recorded losses on the grid of gradient evaluations."""
        seconds = self._now() - self._began - self._paused
        if self._end is not None:
            for name, values in self._measure(self._end).items():
                self._values[name][:, -1] = values
        return Trajectory(
            self._values["loss"],
            seconds,
            self._reached.mean(0),
            self._values.get("held_out_loss"),
            self._values.get("held_out_accuracy"),
            self._drift,
        )

    def _keep(self, parameters: Mapping[str, Tensor], marked: Tensor) -> None:
        """Keeps the parameters of some tasks, to measure them at the end."""
        before = self._end or {name: value.detach() for name, value in self.stack.tensors().items()}
        self._end = {name: where(marked, parameters[name].detach(), value) for name, value in before.items()}

    def _at_start(self) -> dict[str, Array]:
        tensors = {name: value.detach() for name, value in self.stack.tensors().items()}
        of = self._with_held_out, [(value.data_ptr(), value._version) for value in tensors.values()]
        known = _starts.get(self.stack)
        if known is None or known[0] != of:
            known = _starts[self.stack] = of, self._measure(tensors)
        return known[1]

    def _measure(self, parameters: Mapping[str, Tensor]) -> dict[str, Array]:
        stack, score = self.stack, self.stack.score
        held_out = stack.held_out if self._with_held_out else None
        found = {"loss": self.stack.measured(parameters)}
        if held_out is not None:
            # One pass serves the loss and the score.
            outputs = stack.outputs(parameters, held_out[0])
            with torch.no_grad():
                found["held_out_loss"] = stack.each(stack.loss, outputs, *held_out[1])
            if score is not None:
                found["held_out_accuracy"] = stack.each(score, outputs, *held_out[1])
        return {name: values.detach().double().cpu().numpy() for name, values in found.items()}

    def _now(self) -> float:
        if self.stack.device.type == "cuda":
            torch.cuda.synchronize(self.stack.device)
        return time.perf_counter()


def output_drift(stack: TaskStack, before: Mapping[str, Tensor], after: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Relative change of every task's outputs on a batch, in the Frobenius norm and float64, `(tasks,)`.

    Infinite where the new outputs are not finite.

    Args:
        stack: the tasks.
        before: stacked parameters.
        after: stacked parameters.
        batch: inputs and targets, stacked.
    """
    old, new = (stack.outputs(at, batch[0]).double().reshape(len(stack), -1) for at in (before, after))
    scale = torch.linalg.vector_norm(old, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    change = torch.linalg.vector_norm(new - old, dim=1) / scale
    return torch.where(new.isfinite().all(1), change, torch.inf)
