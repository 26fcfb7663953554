"""What the steps of `AdaptiveRule` are mixed of: an arithmetic of a few numbers of each tensor, in torch or in numpy.

Meta-training and stacks of tasks work with tensors, `(tensors, tasks)`. For one small task on a CPU a call of torch
takes longer than its work, and the same functions are given arrays of numpy, `(tensors,)`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metateleport.learned.rules.guard import (
    GUARD_NUMBERS,
    GUARD_SAMPLES,
    JUDGED,
    PLAIN_RATE,
    OfNumbers,
    giving_way,
    places_of,
    verdict,
    weights_of,
)
from metateleport.linalg import Blocks, alike, one_small, polar_steps, side_by_side
from metateleport.point import Tensors

__all__ = [
    "NUMBERS",
    "RECENT_MEMORY",
    "SQUARES_MEMORY",
    "Ledger",
    "Mixture",
    "age",
    "has_polar",
    "layer_of",
    "loudness",
    "owners",
    "run_length",
    "scaled",
]

SQUARES_MEMORY = 0.999
"""Memory of the second moment, about as long as a run: where gradients vanish, the steps have to get shorter too."""

RECENT_MEMORY = 0.95

NUMBERS = ("seen", "recent", "weights")
"""Entries of the state that are a number for each tensor and task."""

_DIRECTIONS = 3
"""Adam's direction, the polar factor's and the gauge's."""

_OUTPUTS = 3 + _DIRECTIONS
"""Number of outputs without the annealing, which comes last."""

_START = 1.25
"""Length of the first steps, of all layers together, over the weights' size."""

_ROUNDINGS = 128.0
"""Gradients of a bias below so many spacings of floating-point numbers at those of its layer's weight are rounding.

In front of a norm 2 to 61 were seen, of real ones none below 10^6."""

_ANNEALING = 3.0
"""The largest exponent of the annealing to a told end."""

_USUAL, _SHORTEST, _MOST = 300, 1 / 30, 10.0
"""Steps of the runs that constants were chosen on, and bounds on that number over the told one.

Longer runs want shorter steps. On the development tasks the best length went with about the root of this ratio; the
third root leaves runs of many thousands of steps enough."""

_LONG, _MANY = 32, 4096
"""A matrix with so many rows, and so many times as many as columns, is the table of a vocabulary: each token's row has
gradients of its own, and the polar factor of all of them would be most of a step's work."""


class Mixture(NamedTuple):
    """What a network's outputs say of the step of each tensor, in tensors or in arrays.

    Args:
        lengths: of the step, $m$.
        news: what the velocity takes of a new gradient, $1 - \\beta$.
        calms: the exponent $\\kappa$.
        shares: of the directions, $c$, along one more dimension.
        annealing: the exponent $a$ of the share of the run that is left; None if no length is told.

    Example:
        >>> vector = Mixture.of(torch.zeros(1, 1, 6), lacks=((False, True, True),), told=False)
        >>> vector.lengths, vector.news, vector.shares
        (tensor([[1.2500]]), tensor([[0.5000]]), tensor([[[1., 0., 0.]]]))
    """

    lengths: Any
    news: Any
    calms: Any
    shares: Any
    annealing: Any = None

    @classmethod
    def of(cls, outputs: Tensor, lacks: tuple[tuple[bool, ...], ...], told: bool) -> Mixture:
        """Reads the outputs.

        Args:
            outputs: of the network, `(tensors, tasks, outputs)`.
            lacks: of each tensor which of the directions it does not have.
            told: whether the last output is the annealing's.
        """
        mask = (_mask.__wrapped__ if torch.compiler.is_compiling() else _mask)(lacks, outputs.device)
        # In one operation, as each has a derivative.
        parts = outputs.unbind(-1)
        return cls(
            _START * (4 * (parts[0] / 4).tanh()).exp(),
            1 - parts[1].sigmoid(),
            parts[2].sigmoid(),
            torch.stack(parts[3:_OUTPUTS], -1).masked_fill(mask, -math.inf).softmax(-1),
            _ANNEALING * parts[_OUTPUTS].sigmoid() if told else None,
        )

    def of_one_task(self) -> Mixture:
        """The same in arrays, `(tensors,)`, of a stack of one task without a graph."""
        return Mixture(*(each if each is None else each.numpy()[:, 0] for each in self))


def _at_least(values: Any, bound: float, xp: Any) -> Any:
    """The values, or the bound where they are below it."""
    # numpy.clip takes ten times as long on a few numbers.
    return np.maximum(values, bound) if xp is np else values.clamp_min(bound)


def age(seen: Any, memory: float, xp: Any) -> Any:
    """The weight of all gradients seen in a running mean that started at zero.

    Example:
        >>> age(torch.tensor([0.0, 1.0, 2.0]), 0.5, torch), age(np.array([2.0]), 0.5, np)
        (tensor([0.5000, 0.5000, 0.7500]), array([0.75]))
    """
    return 1 - memory ** _at_least(seen, 1.0, xp)


def run_length(total: int, left: float, annealing: Any) -> Any:
    """The factor on the steps of a run of a told length, `left` being the share of it that is to come.

    Example:
        >>> run_length(300, 1.0, 0.5), run_length(2400, 0.25, 0.5)
        (1.0, 0.25)
    """
    return min(max(_USUAL / total, _SHORTEST), _MOST) ** (1 / 3) * left**annealing


def scaled(
    mixture: Mixture,
    numbers: tuple[Any, Any, Any],
    speeds: Any,
    sizes: Any,
    tiny: float,
    xp: Any,
) -> Any:
    r"""The length of all directions over the weights' size, $m \lambda$ of `AdaptiveRule`.

    Args:
        mixture: what the network says.
        numbers: how many gradients each tensor has seen, the running mean of their mean squares, and the weight of all
            of them in the velocity.
        speeds: root mean squares of the velocities.
        sizes: root mean squares of velocities over the roots of second moments.
        tiny: smallest number that is reckoned with.
        xp: `torch` or `numpy`.
    """
    seen, recent, weights = numbers
    known = _at_least(weights, 1e-6, xp)
    loud = xp.sqrt(recent / age(seen, RECENT_MEMORY, xp) + tiny)
    adaptive = sizes * xp.sqrt(age(seen, SQUARES_MEMORY, xp)) / known
    # As powers they would take three times as long backwards.
    logs, calm = xp.log(speeds / known / loud), mixture.calms
    return mixture.lengths * xp.exp(logs + (xp.log(adaptive) - logs) * calm)


def loudness(levels: Any, of_weights: Any, eps: float, tiny: float, xp: Any) -> Any:
    """Whether each tensor's gradients are more than rounding of those of its layer's weight, in [0, 1].

    A bias in front of a norm, or of keys, has no gradient but rounding, and a direction of unit length made of that
    would carry it away. Beside those of other layers even real gradients may be as small: of the first layers of deep
    models without norms.

    Args:
        levels: root mean squares of the gradients.
        of_weights: those of the weights of the tensors' layers (`owners`).
        eps: spacing of the numbers at one.
        tiny: smallest number that is reckoned with.
        xp: `torch` or `numpy`.

    Example:
        >>> loudness(np.array([1.0, 1e-20]), np.array([1.0, 1.0]), eps=1e-7, tiny=1e-38, xp=np)
        array([1., 0.])
    """
    above = levels / _at_least(_ROUNDINGS * eps * of_weights, tiny, xp) - 1
    return np.minimum(np.maximum(above, 0.0), 1.0) if xp is np else above.clamp(0.0, 1.0)


def owners(names: Sequence[str]) -> list[int]:
    """The place of the weight of each bias's layer, and of each other tensor its own.

    Example:
        >>> owners(["0.weight", "0.bias", "1.bias"])
        [0, 0, 2]
    """
    known = {name: place for place, name in enumerate(names)}
    weights = [f"{layer_of(name)}.weight" if name.endswith(".bias") else name for name in names]
    return [known.get(own, known[name]) for name, own in zip(names, weights, strict=True)]


def layer_of(name: str) -> str:
    """The name of the layer that a tensor is of."""
    return name.rpartition(".")[0] or name


@functools.lru_cache(maxsize=64)
def _mask(lacks: tuple[tuple[bool, ...], ...], device: torch.device) -> Tensor:
    """Where a tensor has no such direction, `(tensors, 1, directions)`."""
    return torch.tensor(lacks, device=device).unsqueeze(1)


def has_polar(tensor: Tensor) -> bool:
    """Whether a tensor of a stack is a matrix that is stepped along its polar factor."""
    rows = tensor.shape[1] if tensor.ndim > 1 else 1
    return tensor.ndim > 2 and not (rows >= _MANY and rows >= _LONG * tensor.shape[2:].numel())


class Ledger:
    """What `AdaptiveRule` remembers of the tensors of one small task, side by side, for steps in numpy.

    The tensors of the rule's state become views of it, so that each step overwrites what the last one left.

    Args:
        state: the rule's.
        gradients: of the tensors, `(1, ...)` each.
        fixed: further entries of the state, which no step changes.

    Example:
        >>> values = {"weight": torch.ones(1, 2, 3), "bias": torch.ones(1, 2)}
        >>> numbers = {key: dict.fromkeys(values, torch.zeros(1)) for key in NUMBERS}
        >>> ledger = Ledger({"momentum": values, "squares": values, **numbers}, values)
        >>> ledger.whole("momentum").shape, ledger.holds({"momentum": values, "squares": values, **numbers}, values)
        (torch.Size([1, 8]), False)
    """

    def __init__(self, state: Mapping[str, Any], gradients: Tensors, fixed: Sequence[str] = ()) -> None:
        first = next(iter(gradients.values()))
        self.names = list(gradients)
        self.dtype = first.dtype
        self.blocks = Blocks(tuple(value.shape for value in gradients.values()), joined=True)
        self.counts = np.array(self.blocks.counts)
        self.mixture: Any = None
        self._starts = np.cumsum(self.counts) - self.counts
        self._owners = owners(self.names)
        self._views: dict[str, Tensors] = {key: dict(state[key]) for key in fixed}
        self._wholes: Tensors = {}
        for key in ("momentum", "squares"):
            whole = side_by_side([state[key][name].to(self.dtype) for name in self.names])
            self._hold(key, whole, self.blocks.parts([whole]))
        for key in NUMBERS:
            whole = torch.stack([state[key][name].to(self.dtype) for name in self.names])
            self._hold(key, whole, whole.unbind(0))
        self.guarded = all(key in state for key in GUARD_SAMPLES)
        if self.guarded:
            for key in GUARD_SAMPLES:
                parts = [state[key][name].to(self.dtype) for name in self.names]
                whole = side_by_side(parts)
                self._hold(key, whole, whole.split([each.shape[1] for each in parts], 1))
            sampled = places_of(self.blocks.shapes, first.device)
            self._places = slice(None) if sampled is None else sampled.numpy()
            self._weights = weights_of(self.blocks.shapes, self.dtype, first.device).numpy()
            self._samples = np.array([each.shape[1] for each in parts])
        self._work = torch.empty_like(self._wholes["momentum"])
        places = {name: place for place, name in enumerate(self.names)}
        steps = dict(zip(self.names, self.blocks.parts([self._work]), strict=True))
        velocities = self._views["momentum"]
        matrices = {name: value for name, value in velocities.items() if has_polar(value)}
        self._groups = [
            _Matrices.of([places[name] for name in group], [(matrices[name], steps[name]) for name in group])
            for group in alike(matrices)
        ]
        self._lies = {key: _lies_at(own) for key, own in self._views.items()}

    def _hold(self, key: str, whole: Tensor, parts: Sequence[Tensor]) -> None:
        self._wholes[key] = whole
        self._views[key] = dict(zip(self.names, parts, strict=True))

    @staticmethod
    def serves(gradients: Tensors) -> bool:
        """Whether the tensors of a point are those of one small task on a CPU, without a graph."""
        values = list(gradients.values())
        if values[0].dtype not in (torch.float32, torch.float64) or not one_small(values):
            return False
        return all(each.shape[0] == 1 and each.numel() for each in values)

    def holds(self, state: Mapping[str, Any], gradients: Tensors) -> bool:
        """Whether the state's tensors still lie in its memory."""
        if self.names != list(gradients) or self.dtype != next(iter(gradients.values())).dtype:
            return False
        return all(_lies_at(state[key]) == known for key, known in self._lies.items())

    @property
    def place(self) -> int:
        """Where its memory begins."""
        return self._wholes["momentum"].data_ptr()

    def whole(self, key: str) -> Tensor:
        """One entry of the state of all tensors, `(1, entries)`."""
        return self._wholes[key]

    def _array(self, key: str) -> Any:
        whole = self._wholes[key]
        return whole.numpy()[:, 0] if key in NUMBERS else whole.numpy()[0]

    def _means(self, entries: Any) -> Any:
        return np.add.reduceat(entries, self._starts) / self.counts

    def _roots(self, entries: Any, tiny: float) -> Any:
        return np.sqrt(self._means(entries) + tiny)

    def step(
        self,
        gradients: Tensors,
        parameters: Tensors,
        state: Mapping[str, Any],
        taken: float,
        heard: Callable[[Tensor, Tensor, Any, Any], tuple[Mixture, dict[str, Any]]],
        scale: Callable[[Any], Any],
        left: float,
    ) -> tuple[Tensors, dict[str, Any]]:
        """The step of `AdaptiveRule`.

        Args:
            gradients: of the tensors.
            parameters: where they stand.
            state: the rule's, of which this is the ledger.
            taken: one where the last step was taken; zero where it was taken back, and this gradient is seen again.
            heard: what the network says, given gradients and parameters side by side, and the mean squares of the
                gradients and their running mean, `(tensors,)`; with what it remembers.
            scale: the weights' size, as shortened with time, given the exponents of the annealing.
            left: the share of the run that is to come.

        Returns:
            The new parameters, and the entries of the state that are new.
        """
        held = side_by_side(list(gradients.values()))
        here = side_by_side([parameters[name] for name in self.names])
        now, moved = held.numpy()[0], here.numpy()[0]
        numbers = torch.finfo(self.dtype)
        tiny = numbers.tiny
        velocity, squares = self._array("momentum"), self._array("squares")
        seen, recent, weights = (self._array(key) for key in NUMBERS)
        with np.errstate(all="ignore"):
            weighed: Any = now[self._places] * self._weights if self.guarded else None
            judged = {} if weighed is None else self._judged(state, weighed, taken, tiny)
            seen += taken
            work = np.square(now, out=self._work.numpy()[0])
            powers = self._means(work)
            recent += (powers - recent) * ((1 - RECENT_MEMORY) * taken)
            work -= squares
            work *= (1 - SQUARES_MEMORY) * taken
            squares += work
            levels, young = self._means(squares), age(seen, SQUARES_MEMORY, np)
            mixture, remembered = heard(held, here, powers, levels / young)
            news = mixture.news * taken
            weights += (1 - weights) * news
            np.subtract(now, velocity, out=work)
            work *= self._spread(news)
            velocity += work
            np.square(velocity, out=work)
            speeds = self._roots(work, tiny)
            np.add(squares, self._spread(1e-8 * (levels + tiny * young) + tiny), out=work)
            np.sqrt(work, out=work)
            step = np.divide(velocity, work, out=work)
            sizes = self._roots(np.square(step), tiny)
            levels = np.sqrt(levels / young)
            loud = loudness(levels, levels[self._owners], numbers.eps, tiny, np)
            lengths = scaled(mixture, (seen, recent, weights), speeds, sizes, tiny, np)
            lengths = lengths * loud * scale(mixture.annealing)
            factors, lengths = -lengths * mixture.shares[:, 0] / sizes, -lengths[:, None] * mixture.shares
            if self.guarded:
                plain = PLAIN_RATE * left * loud * np.sqrt(young) / _at_least(weights, 1e-6, np)
                self._array("plain")[:] = step[self._places] * np.repeat(-plain, self._samples)
                factors, lengths = giving_way(np.asarray(judged["trust"]), factors, lengths, plain)
            step *= self._spread(factors)
            self._add_polar(lengths[:, 1], speeds, tiny)
            moved += step
            if self.guarded:
                last = self._array("taken")
                last[:] = step[self._places]
                judged["begun"] = float(np.dot(weighed, last))
        views = {key: dict(own) for key, own in self._views.items()}
        said = torch.from_numpy(np.array([*judged.values()], velocity.dtype))
        found = dict(zip(judged, said.split(1) if judged else (), strict=True))
        return dict(zip(self.names, self.blocks.parts([here]), strict=True)), {**remembered, **views, **found}

    def _spread(self, factors: Any) -> Any:
        return np.repeat(factors.astype(self._array("squares").dtype, copy=False), self.counts)

    def _judged(self, state: Mapping[str, Any], weighed: Any, taken: float, tiny: float) -> dict[str, Any]:
        """`guard.judged`, given a sample of the gradients, each entry times the number of those it stands for."""
        before = {key: float(state[key]) for key in GUARD_NUMBERS}
        ended, plain = (float(np.dot(weighed, self._array(key))) for key in GUARD_SAMPLES)
        known = bool(taken) and before["begun"] != 0
        return dict(zip(JUDGED, verdict(before, ended, plain, known, tiny, OfNumbers), strict=True))

    def _add_polar(self, lengths: Any, speeds: Any, tiny: float) -> None:
        """Adds the polar factors' share to the step of the matrices among the tensors."""
        for group in self._groups:
            # The matrices' root mean squares are known, and so their norms are.
            norms = np.sqrt(speeds[group.places] ** 2 * group.counts + math.sqrt(tiny))
            for own, norm, part in zip(group.matrices, norms, group.parts, strict=True):
                np.divide(own, norm, out=part)
            found = polar_steps(group.filled).numpy()
            flat = found.reshape(len(found), -1)
            sizes = np.sqrt(np.einsum("ij,ij->i", flat, flat) / group.counts + tiny)
            factors = lengths[group.places] / sizes
            for step, direction, factor in zip(group.steps, found, factors, strict=True):
                rows, columns = step.shape
                np.add(step, factor * direction[:rows, :columns], out=step)


def _lies_at(tensors: Tensors) -> list[int]:
    """Where some tensors lie. They may be moved under their names: to memory that processes share, or as `data`."""
    return [each.data_ptr() for each in tensors.values()]


class _Matrices(NamedTuple):
    """Matrices that polar factors are taken of in one call: views with the smaller side in rows.

    Args:
        places: of the tensors.
        counts: of their entries.
        matrices: the velocities.
        steps: theirs.
        filled: memory for all of them in one size.
        parts: where each of them is in it.
    """

    places: Any
    counts: Any
    matrices: list[Any]
    steps: list[Any]
    filled: Tensor
    parts: list[Any]

    @classmethod
    def of(cls, places: Sequence[int], tensors: Sequence[tuple[Tensor, Tensor]]) -> _Matrices:
        """From the tensors' places, and their velocities and steps."""
        own, theirs = ([_flat(each) for each in kind] for kind in zip(*tensors, strict=True))
        rows, columns = (max(each.shape[side] for each in own) for side in (0, 1))
        filled = tensors[0][0].new_zeros(len(own), rows, columns)
        parts = [part[: each.shape[0], : each.shape[1]] for part, each in zip(filled.numpy(), own, strict=True)]
        return cls(np.array(places), np.array([each.size for each in own]), own, theirs, filled, parts)


def _flat(tensor: Tensor) -> Any:
    """A tensor of one task as a matrix with its smaller side in rows; a view."""
    matrix = tensor.numpy()[0].reshape(tensor.shape[1], -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
