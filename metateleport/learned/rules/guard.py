"""The safeguard of a learned step: where it does worse than AdamW's step would, it gives way to that."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.linalg import Blocks, consecutive
from metateleport.point import Tensors

__all__ = [
    "GUARD_NUMBERS",
    "GUARD_SAMPLES",
    "PLAIN_RATE",
    "Sample",
    "giving_way",
    "guard_state",
    "judged",
    "noted",
    "sampled",
]

PLAIN_RATE = 1e-3
"""Learning rate of the step that a learned one gives way to: AdamW's default."""

GUARD_SAMPLES = ("taken", "plain")
"""Entries of a rule's state, by tensor: the last step on a sample of its entries, and the one that AdamW had taken."""

JUDGED = ("trust", "most", "behind")
"""Entries of a rule's state that an evaluation changes (`judged`)."""

GUARD_NUMBERS = (*JUDGED, "begun")
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
    samples = {name: torch.zeros_like(sampled(value)) for name, value in point_gradients.items()}
    return {
        **{key: dict(samples) for key in GUARD_SAMPLES},
        **dict.fromkeys(GUARD_NUMBERS, zero),
        "trust": torch.full_like(like, _BEGINS),
        "most": torch.ones_like(like),
    }


@torch.no_grad()
def judged(state: Mapping[str, Any], seen: Sample, accepted: Tensor) -> dict[str, Tensor]:
    r"""How far the learned step is trusted after an evaluation at its end.

    With $\Delta$ the last step, $\Delta_A$ the one that AdamW would have taken in its place, $G$ the gradient before it
    and $G'$ that after it, of another minibatch,

    $$b \mapsto 0.8\,b + 0.2\, \frac{\langle G', \Delta_A \rangle - \langle G', \Delta \rangle}
      {|\langle G, \Delta \rangle| + |\langle G', \Delta \rangle|}.$$

    $G'$ has not seen either step, so its inner products are fair to both: they are the slopes that are left at the end.
    Where $b < -0.3$ the trust falls, and with it the most that it may rise to for some time; else it rises.

    Args:
        state: of the rule.
        seen: of the gradients at the new point.
        accepted: where the last step was not taken back, `(tasks,)`.

    Returns:
        The entries `trust`, `most` and `behind`, `(tasks,)`.
    """
    ended, plain = (seen.slope(seen.joined(state[key])) for key in GUARD_SAMPLES)
    known, tiny = accepted & (state["begun"] != 0), torch.finfo(ended.dtype).tiny
    return dict(zip(JUDGED, verdict(state, ended, plain, known, tiny, torch), strict=True))


def verdict(state: Mapping[str, Any], ended: Any, plain: Any, known: Any, tiny: float, xp: Any) -> tuple[Any, Any, Any]:
    """The entries `trust`, `most` and `behind` (`judged`), of tensors or of numbers.

    Args:
        state: of the rule; only what is in `GUARD_NUMBERS` is read.
        ended: slope along the last step at its end.
        plain: slope along AdamW's step there.
        known: where there was a last step, and it was not taken back.
        tiny: smallest number that is reckoned with.
        xp: has `where`, `clip`, `minimum` and `logical_not`: `torch`, or `OfNumbers`.
    """
    before, trust, most = state["behind"], state["trust"], state["most"]
    now = (plain - ended) / xp.clip(abs(state["begun"]) + abs(ended), tiny, None)
    behind = xp.where(known, now + (before - now) * _MEMORY, before)
    fails = xp.logical_not(behind >= -_ALLOWED)
    limit = xp.where(fails, trust * _GIVES, xp.clip(most * _COMES_BACK, None, 1.0))
    # What was seen of longer steps is only half of the evidence against shorter ones.
    behind = xp.where(fails, behind / 2, behind)
    return (
        xp.where(known, xp.minimum(limit, trust * _RISES), trust),
        xp.where(known, limit, most),
        xp.where(known, behind, before),
    )


class OfNumbers:
    """What `verdict` asks of `torch`, for Python's numbers."""

    minimum = staticmethod(min)
    logical_not = staticmethod(operator.not_)

    @staticmethod
    def where(condition: bool, one: float, other: float) -> float:
        return one if condition else other

    @staticmethod
    def clip(value: float, least: float | None, most: float | None) -> float:
        if least is not None:
            value = max(value, least)
        return value if most is None else min(value, most)


def giving_way(trust: Any, factors: Any, lengths: Any, plain: Any) -> tuple[Any, Any]:
    """The factors of Adam's direction and the lengths of all directions where a step is trusted in part.

    Of arrays, as of tensors; those of one task have no dimension of tasks.

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
    return trust * factors - (1 - trust) * plain, lengths * trust[..., None]


@torch.no_grad()
def noted(seen: Sample, before: Sequence[Tensor], after: Sequence[Tensor], plain: Tensor) -> dict[str, Any]:
    """The entries of the state that tell what this step did, and what AdamW's had done.

    Args:
        seen: of the gradients that it was made of.
        before: the parameters before it, in blocks.
        after: and after it.
        plain: a sample of the step that AdamW had taken, as `Sample.stepped` gives it.
    """
    taken = seen.of(after) - seen.of(before)
    return {"taken": seen.by_name(taken), "plain": seen.by_name(plain), "begun": seen.slope(taken)}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some entries of every tensor, evenly spread over rows and columns, side by side: `(tasks, entries)`.

    Args:
        names: of the tensors.
        blocks: how they are laid out.
        weighed: the sample of their gradients, each entry times the number of those that it stands for.

    Example:
        >>> values = [torch.arange(3.0).reshape(1, 3), torch.ones(1, 2, 2)]
        >>> sample = Sample.of_gradients(["a", "b"], Blocks.of(values, free=False), values)
        >>> sample.of(values), sample.slope(torch.ones(1, 7))
        (tensor([[0., 1., 2., 1., 1., 1., 1.]]), tensor([7.]))
    """

    names: Sequence[str]
    blocks: Blocks
    weighed: Tensor

    @classmethod
    @torch.no_grad()
    def of_gradients(cls, names: Sequence[str], blocks: Blocks, gradients: Sequence[Tensor]) -> Sample:
        """The sample of some gradients, in blocks."""
        own = _sample_of(blocks, gradients)
        return cls(names, blocks, own * weights_of(blocks.shapes, own.dtype, own.device))

    @property
    def counts(self) -> tuple[int, ...]:
        """How many entries of each tensor are in it."""
        return _counts(self.blocks.shapes)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same entries of other tensors that are laid out in blocks."""
        return _sample_of(self.blocks, tensors)

    @torch.no_grad()
    def stepped(self, directions: Sequence[Tensor], lengths: Tensor) -> Tensor:
        """The same entries of steps against some directions, in blocks, times their lengths, `(tensors, tasks)`."""
        return -lengths.mT.index_select(1, _owners(self.counts, lengths.device)) * self.of(directions)

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The samples of all tensors side by side."""
        own = [parts[name] for name in self.names]
        whole = consecutive(own)
        return torch.cat(own, 1) if whole is None else whole

    def by_name(self, whole: Tensor) -> Tensors:
        """The samples of all tensors by their names."""
        return dict(zip(self.names, whole.split(self.counts, 1), strict=True))

    def slope(self, steps: Tensor) -> Tensor:
        """How fast the loss rises along a step, `(tasks,)`, where a sampled tensor counts with all of its entries."""
        return (self.weighed * steps).sum(1)


def _sample_of(blocks: Blocks, tensors: Sequence[Tensor]) -> Tensor:
    if not blocks.joined:
        return torch.cat([sampled(each) for each in tensors], 1)
    places = places_of(blocks.shapes, tensors[0].device)
    return tensors[0] if places is None else tensors[0].index_select(1, places)


def sampled(tensor: Tensor) -> Tensor:
    """The sample of one tensor, `(tasks, entries)`."""
    return tensor.flatten(1)[:, :: _stride(tensor.shape[1:])]


@functools.lru_cache(maxsize=1024)
def _stride(shape: torch.Size) -> int:
    """Entries of a tensor to one of its sample."""
    stride = max(1, shape.numel() // _SAMPLE)
    # With a factor in common with the row's length it would meet the same columns in every row.
    while math.gcd(stride, math.prod(shape[1:])) > 1:
        stride += 1
    return stride


@functools.lru_cache(maxsize=64)
def _counts(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    """How many entries of each tensor are in the sample."""
    return tuple(-(-shape[1:].numel() // _stride(shape[1:])) for shape in shapes)


@functools.lru_cache(maxsize=64)
def weights_of(shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many entries of its tensor each entry of the sample stands for."""
    counts = _counts(shapes)
    each = [shape[1:].numel() / max(count, 1) for shape, count in zip(shapes, counts, strict=True)]
    return torch.tensor(each, dtype=dtype).repeat_interleave(torch.tensor(counts)).to(device)


@functools.lru_cache(maxsize=64)
def places_of(shapes: tuple[torch.Size, ...], device: torch.device) -> Tensor | None:
    """Where the entries of the sample are among all entries side by side; None if it is of all of them."""
    ends = list(itertools.accumulate((shape[1:].numel() for shape in shapes), initial=0))
    strides = [_stride(shape[1:]) for shape in shapes]
    if max(strides, default=1) == 1:
        return None
    parts = [
        torch.arange(start, end, stride) for (start, end), stride in zip(itertools.pairwise(ends), strides, strict=True)
    ]
    return torch.cat(parts).to(device)


@functools.lru_cache(maxsize=64)
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tensor each entry of the sample is of."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
