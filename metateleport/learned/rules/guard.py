"""The safeguard of a learned step: where it does worse than AdamW's step would, it gives way to that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.point import Tensors

__all__ = [
    "GUARD_NUMBERS",
    "GUARD_SAMPLES",
    "PLAIN_RATE",
    "giving_way",
    "guard_state",
    "judged",
    "noted",
    "plain_steps",
]

PLAIN_RATE = 1e-3
"""Learning rate of the step that a learned one gives way to: AdamW's default."""

GUARD_SAMPLES = ("taken", "plain")
"""Entries of a rule's state, by tensor: the last step on a sample of its entries, and the one that AdamW had taken."""

GUARD_NUMBERS = ("trust", "most", "behind", "begun")
"""Entries of a rule's state that are a number for each task."""

_SAMPLE = 1024
"""Entries of a tensor that slopes are estimated on: beside the noise of a minibatch, more tell no more."""

_MEMORY = 0.8

_ALLOWED = 0.3
"""How far, in slopes at both ends of a step, the learned step may be behind at its end before it gives way.

Near rest, where noise and progress balance, every step ends a little uphill and the longer one further, and that is no
failure: means of -0.25 were seen in runs that did well, and below -0.5 in those that did not."""

_BEGINS, _RISES = 0.1, 1.3
"""The trust in the first step, and its factor from step to step: what is much too long then does no lasting harm."""

_GIVES, _COMES_BACK = 0.7, 1.02
"""Factors on the most that the trust may be, where a step gives way and where it does not."""


def guard_state(point_gradients: Mapping[str, Tensor], like: Tensor) -> dict[str, Any]:
    """The state before the first step.

    Args:
        point_gradients: of each tensor, `(tasks, ...)`.
        like: a tensor `(tasks,)`.
    """
    zero = torch.zeros_like(like)
    samples = {name: torch.zeros_like(_sampled(value)) for name, value in point_gradients.items()}
    return {
        **{key: dict(samples) for key in GUARD_SAMPLES},
        **dict.fromkeys(GUARD_NUMBERS, zero),
        "trust": torch.full_like(like, _BEGINS),
        "most": torch.ones_like(like),
    }


@torch.no_grad()
def judged(state: Mapping[str, Any], gradients: Tensors, accepted: Tensor) -> dict[str, Tensor]:
    r"""How far the learned step is trusted after an evaluation at its end.

    With $\Delta$ the last step, $\Delta_A$ the one that AdamW would have taken in its place, $G$ the gradient before it
    and $G'$ that after it, of another minibatch,

    $$b \mapsto 0.8\,b + 0.2\, \frac{\langle G', \Delta_A \rangle - \langle G', \Delta \rangle}
      {|\langle G, \Delta \rangle| + |\langle G', \Delta \rangle|}.$$

    $G'$ has not seen either step, so its inner products are fair to both: they are the slopes that are left at the end.
    Where $b < -0.3$ the trust falls, and with it the most that it may rise to for some time; else it rises.

    Args:
        state: of the rule.
        gradients: at the new point.
        accepted: where the last step was not taken back, `(tasks,)`.

    Returns:
        The entries `trust`, `most` and `behind`, `(tasks,)`.
    """
    ended, plain = (_slope(gradients, state[key]) for key in GUARD_SAMPLES)
    known = accepted & (state["begun"] != 0)
    size = state["begun"].abs() + ended.abs()
    now = (plain - ended) / size.clamp_min(torch.finfo(size.dtype).tiny)
    behind = torch.where(known, torch.lerp(now, state["behind"], _MEMORY), state["behind"])
    fails = ~(behind >= -_ALLOWED)
    trust, most = state["trust"], state["most"]
    most = torch.where(fails, trust * _GIVES, (most * _COMES_BACK).clamp_max(1.0))
    # What was seen of longer steps is only half of the evidence against shorter ones.
    behind = torch.where(fails, behind / 2, behind)
    found = {"trust": most.minimum(trust * _RISES), "most": most, "behind": behind}
    return {key: torch.where(known, value, state[key]) for key, value in found.items()}


def giving_way(trust: Tensor, factors: Tensor, lengths: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of Adam's direction and the lengths of all directions where a step is trusted in part.

    Args:
        trust: `(tasks,)`.
        factors: of Adam's direction in the learned step, `(tensors, tasks)`.
        lengths: of all directions of the learned step, `(tensors, tasks, directions)`.
        plain: of Adam's direction in AdamW's step, `(tensors, tasks)`.

    Example:
        >>> one = torch.ones(1, 1)
        >>> giving_way(torch.tensor([0.25]), -4 * one, -4 * one.unsqueeze(-1), one)
        (tensor([[-1.7500]]), tensor([[[-1.]]]))
    """
    return trust * factors - (1 - trust) * plain, lengths * trust.unsqueeze(-1)


@torch.no_grad()
def plain_steps(names: Sequence[str], directions: Sequence[Tensor], factors: Tensor) -> Tensors:
    """A sample of the step that AdamW would take.

    Args:
        names: of the tensors.
        directions: Adam's direction of each.
        factors: what it is multiplied by, `(tensors, tasks)`.
    """
    return {
        name: -factor.unsqueeze(-1) * _sampled(direction)
        for name, direction, factor in zip(names, directions, factors, strict=True)
    }


@torch.no_grad()
def noted(gradients: Tensors, before: Tensors, after: Tensors, plain: Tensors) -> dict[str, Any]:
    """The entries of the state that tell what this step did.

    Args:
        gradients: that it was made of.
        before: the parameters before it.
        after: and after it.
        plain: what `plain_steps` gave.
    """
    taken = {name: _sampled(after[name]) - _sampled(before[name]) for name in gradients}
    return {"taken": taken, "plain": plain, "begun": _slope(gradients, taken)}


def _sampled(tensor: Tensor) -> Tensor:
    """Some entries of each task's tensor, evenly spread over rows and columns, `(tasks, entries)`."""
    flat = tensor.flatten(1)
    stride = max(1, flat.shape[1] // _SAMPLE)
    # With a factor in common with the row's length it would meet the same columns in every row.
    while math.gcd(stride, math.prod(tensor.shape[2:])) > 1:
        stride += 1
    return flat[:, ::stride]


def _slope(gradients: Tensors, steps: Mapping[str, Tensor]) -> Tensor:
    """How fast the loss rises along a step, `(tasks,)`, where sampled tensors count with all of their entries."""
    total: Tensor | None = None
    for name, gradient in gradients.items():
        own = _sampled(gradient)
        weight = gradient[0].numel() / own.shape[1]
        product = (own * steps[name]).sum(1) * weight
        total = product if total is None else total + product
    assert total is not None
    return total
