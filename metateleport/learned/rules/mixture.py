"""What the steps of `AdaptiveRule` are mixed of: an arithmetic of a few numbers of each tensor, in torch or in numpy.

Meta-training and stacks of tasks work with tensors, `(tensors, tasks)`. For one small task on a CPU a call of torch
takes longer than its work, and the same functions are given arrays of numpy, `(tensors,)`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DIRECTIONS",
    "OUTPUTS",
    "RECENT_MEMORY",
    "SQUARES_MEMORY",
    "Mixture",
    "age",
    "layer_of",
    "loudness",
    "owners",
    "run_length",
    "scaled",
]

SQUARES_MEMORY = 0.999
"""Memory of the second moment, about as long as a run: where gradients vanish, the steps have to get shorter too."""

RECENT_MEMORY = 0.95

DIRECTIONS = 3
"""Adam's direction, the polar factor's and the gauge's."""

OUTPUTS = 3 + DIRECTIONS
"""Number of outputs without the annealing, which comes last."""

_START = 1.25
"""Length of the first steps, of all layers together, over the weights' size."""

_ROUNDINGS = 128.0
"""Gradients of a bias below so many spacings of floating-point numbers at those of its layer's weight are rounding.

In front of a norm 2 to 61 were seen, of real ones none below 10^6."""

_ANNEALING = 3.0
"""The largest exponent of the annealing to a told end."""

_USUAL, _SHORTEST, _LONGEST = 300, 1 / 30, 10.0
"""Steps of the runs that constants were chosen on, and bounds on that number over the told one.

Longer runs want shorter steps. On the development tasks the best length went with about the root of this ratio; the
third root leaves runs of many thousands of steps enough."""


class Mixture(NamedTuple):
    """What a network's outputs say of the step of each tensor, in tensors or in arrays.

    Args:
        lengths: of the step, $m$.
        news: what the velocity takes of a new gradient, $1 - \\beta$.
        calms: the exponent $\\kappa$.
        shares: of the directions, $c$, along one more dimension.
        annealing: the exponent $a$ of the share of the run that is left; None if no length is told.
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
        return cls(
            _START * (4 * (outputs[..., 0] / 4).tanh()).exp(),
            1 - outputs[..., 1].sigmoid(),
            outputs[..., 2].sigmoid(),
            outputs[..., 3:OUTPUTS].masked_fill(mask, -math.inf).softmax(-1),
            _ANNEALING * outputs[..., OUTPUTS].sigmoid() if told else None,
        )

    def of_one_task(self) -> Mixture:
        """The same in arrays, `(tensors,)`, of a stack of one task without a graph."""
        return Mixture(*(each if each is None else each.numpy()[:, 0] for each in self))


def age(seen: Any, memory: float, xp: Any) -> Any:
    """The weight of all gradients seen in a running mean that started at zero."""
    return 1 - memory ** xp.clip(seen, 1.0, None)


def run_length(total: int, left: float, annealing: Any) -> Any:
    """The factor on the steps of a run of a told length, `left` being the share of it that is to come."""
    return min(max(_USUAL / total, _SHORTEST), _LONGEST) ** (1 / 3) * left**annealing


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
    known = xp.clip(weights, 1e-6, None)
    loud = xp.sqrt(recent / age(seen, RECENT_MEMORY, xp) + tiny)
    adaptive = sizes * xp.sqrt(age(seen, SQUARES_MEMORY, xp)) / known
    return mixture.lengths * adaptive**mixture.calms * (speeds / known / loud) ** (1 - mixture.calms)


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
    """
    return xp.clip(levels / xp.clip(_ROUNDINGS * eps * of_weights, tiny, None) - 1, 0.0, 1.0)


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
