"""Training loops as people write them, and what is kept of a run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt

from .models import Batch, Problem
from .stand_in import ADAMW, GAUGED, Gauged, StandIn

__all__ = ["MIDDLE", "STEPS", "Bench", "Course", "Loop", "by_closure", "by_loss", "plain"]

STEPS, MIDDLE, ROWS = 16, 6, 16
_NOISE = 1e3
"""So many spacings of numbers, over the largest gradient, are rounding."""

_BATCHES = 4

One = Callable[["Loop", Batch], None]
"""One step of a training loop."""


@dataclasses.dataclass(frozen=True)
class Course:
    """What is kept of a run.

    Args:
        weights: the parameters at its end.
        start: those at its beginning.
        trained: whether each was given a gradient that is more than the rounding of the others.
        before: the loss at the beginning.
        after: the loss at the end.
        said: what was warned of.
    """

    weights: list[Tensor]
    start: list[Tensor]
    trained: list[bool]
    before: float
    after: float
    said: tuple[str, ...]


class Bench:
    """One problem, one checkpoint and one device, and the runs that an idiom makes there.

    Args:
        problem: the model and its data.
        checkpoint: a shipped checkpoint's name, or that of the stand-in.
        device: where.
    """

    def __init__(self, problem: Problem, checkpoint: str, device: str = "cpu") -> None:
        self.problem, self.checkpoint, self.device = problem, checkpoint, device
        self.loops: list[Loop] = []

    def model(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
        """A new model, the same one each time."""
        return self.problem.model(dropout, dtype, self.device)

    def data(self, rows: int = _BATCHES * ROWS, dtype: torch.dtype = torch.float64, seed: int = 1) -> Batch:
        """The samples that are trained on."""
        return self.problem.data(rows, seed, dtype, self.device)

    def batches(self, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> list[Batch]:
        """A batch for every step; after four they come round again."""
        whole = self.data(dtype=dtype)
        cut = [tuple(each[k * ROWS : (k + 1) * ROWS] for each in whole) for k in range(_BATCHES)]
        return [cut[step % _BATCHES] for step in range(steps)]

    def optimizer(self, what: Any, **settings: Any) -> torch.optim.Optimizer:
        """The optimizer under test, for a model or for parameters."""
        if self.checkpoint == ADAMW:
            return StandIn(what, **settings)
        if self.checkpoint == GAUGED:
            return Gauged(what, **{name: value for name, value in settings.items() if name != "checkpoint"})
        return mt.LearnedOptimizer(what, settings.pop("checkpoint", self.checkpoint), **settings)

    def found(self) -> dict[str, Any]:
        """What the optimizer is told of the bare model's symmetries."""
        if not self.problem.example or self.checkpoint == ADAMW:
            return {}
        return {"symmetries": _symmetries(self.problem)}

    def plain(self, steps: int = STEPS, one: One | None = None, **settings: Any) -> Course:
        """The reference: `loss.backward(); optimizer.step()` on the bare model. Run once, however often asked for."""
        key = tuple(sorted(settings.items(), key=lambda pair: pair[0]))
        return _reference(self.problem, self.checkpoint, self.device, steps, one or plain, key)


@functools.cache
def _symmetries(problem: Problem) -> tuple[mt.Symmetry, ...]:
    inputs = problem.data(5)[:-1]
    return tuple(mt.find_symmetries(problem.model(), inputs).exact)


@functools.cache
def _reference(problem: Problem, checkpoint: str, device: str, steps: int, one: One, settings: Any) -> Course:
    given = dict(settings)
    loop = Loop(Bench(problem, checkpoint, device), **given)
    return loop.run(one, steps=steps)


class Loop:
    """A model, its optimizer and the steps taken with them.

    Args:
        bench: where it runs.
        model: a model to train in place of the bench's own.
        optimizer: takes the place of the one that would be made.
        watched: the module whose parameters are looked at, if it is not the model.
        dtype: of the model and its data.
        dropout: of the bench's own model.
        settings: for the optimizer; symmetries among them if they are not to be those of the bare model.
    """

    def __init__(
        self,
        bench: Bench,
        *,
        model: nn.Module | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        watched: nn.Module | None = None,
        dtype: torch.dtype = torch.float64,
        dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.bench, self.dtype, self.noisy = bench, dtype, dropout > 0
        self.said: list[str] = []
        bare = model is None
        self.model = bench.model(dtype, dropout) if model is None else model
        self.watched = watched or self.model
        self.start = _copies(self.watched)
        self.trained = [False] * len(self.start)
        self.before = self.evaluated()
        bench.loops.append(self)
        told = bench.found() if bare and "symmetries" not in settings else {}
        with self.listening():
            if optimizer is None:
                self.optimizer = bench.optimizer(self.model, **told, **settings)
            else:
                self.optimizer = optimizer(self.model)

    def listening(self) -> _Listening:
        """Keeps what is warned of."""
        return _Listening(self.said)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return self.bench.problem.loss(self.model, batch)

    def gradients(self, batch: Batch) -> Tensor:
        """Clears the gradients, makes those of a batch and returns its loss."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        return loss

    def evaluated(self) -> float:
        """The loss of all the data, without dropout; where there is none in training mode, for batch statistics."""
        model = copy.deepcopy(self.model) if self.noisy else self.model
        model.train(not self.noisy)
        with torch.no_grad():
            return float(self.bench.problem.loss(model, self.bench.data(dtype=self.dtype)))

    def take(self, one: One, batch: Batch) -> None:
        """One step."""
        with self.listening():
            one(self, batch)
        sizes = [0.0 if value.grad is None else _largest(value.grad) for value in self.watched.parameters()]
        noise = min(_NOISE * torch.finfo(self.dtype).eps, 1e-3) * max(sizes)
        self.trained = [before or size > noise for before, size in zip(self.trained, sizes, strict=True)]

    def run(self, one: One, batches: Sequence[Batch] | None = None, steps: int = STEPS) -> Course:
        """A step for each batch; those of the bench if none are given."""
        for batch in self.bench.batches(self.dtype, steps) if batches is None else batches:
            self.take(one, batch)
        return self.course()

    def course(self) -> Course:
        """What is kept of the run up to here."""
        weights = _copies(self.watched)
        for value in weights:
            assert bool(torch.isfinite(value).all()), "a weight is not finite"
        return Course(weights, self.start, self.trained, self.before, self.evaluated(), tuple(self.said))

    def moved(self) -> bool:
        """Whether any parameter is no longer what it was at the start."""
        pairs = zip(_copies(self.watched), self.start, strict=True)
        return any(not torch.equal(now, then) for now, then in pairs)


class _Listening:
    def __init__(self, said: list[str]) -> None:
        self.said, self.caught = said, warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self.heard = self.caught.__enter__()
        warnings.simplefilter("always")

    def __exit__(self, *error: Any) -> None:
        self.said += [str(each.message) for each in self.heard]
        self.caught.__exit__(*error)


def _largest(gradient: Tensor) -> float:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(values.abs().max()) if values.numel() else 0.0


def _copies(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.parameters()]


def plain(loop: Loop, batch: Batch) -> None:
    """Backward and step."""
    loop.gradients(batch)
    loop.optimizer.step()


def by_loss(loop: Loop, batch: Batch) -> None:
    """Backward and step, which is told the loss."""
    loss = loop.gradients(batch)
    loop.optimizer.step(loss=loss)  # type: ignore[call-arg]


def by_closure(loop: Loop, batch: Batch) -> None:
    """A step that evaluates the model itself."""
    loop.optimizer.step(lambda: loop.gradients(batch))  # type: ignore[arg-type]
