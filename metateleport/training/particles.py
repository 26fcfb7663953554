"""Tasks followed side by side, each by networks of its own, without a graph."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metateleport.families import TaskStack
from metateleport.learned.copies import Copies
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.scoring import bounded, openness_sum
from metateleport.training.unroll import Unroll

__all__ = ["Particles", "Seen"]

_CHUNK = 50
"""Inner steps whose losses are kept at a time."""


class Seen(NamedTuple):
    """What a window has shown of each task, `(tasks,)`: its mean log loss, the sum and the number of openness."""

    losses: Tensor
    opened: Tensor
    counted: Tensor


class Particles:
    """A stack of tasks on its way through windows of inner steps, each task by networks of its own.

    Where every weight is in a layer whose input has a row for each task (`UpdateRule.rows_by_task`), one set of batched
    kernels serves all of them; other rules are run task by task. Memory does not grow with the number of steps.

    Args:
        stack: the tasks at their start; their parameters move along.
        meta: tells the shape of the networks; it is not changed.
        total: number of inner steps of the run, where the networks are told.
        unseen: share of the loss on held-out data in what is seen.

    Example:
        >>> from metateleport import load_family
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> particles = Particles(load_family("leaky_mlp", {"width": 3}).stack([0, 0]), meta)
        >>> weights = nn.utils.parameters_to_vector(meta.parameters()).detach()
        >>> seen = particles.window(3, torch.stack((weights, weights + 1)))
        >>> bool(seen.losses[0] != seen.losses[1])
        True
    """

    def __init__(self, stack: TaskStack, meta: MetaOptimizer, total: int | None = None, unseen: float = 0.0) -> None:
        if side_by_side(meta):
            self._unrolls = [Unroll(stack, _stacked(meta, len(stack)), total=total, unseen=unseen)]
        else:
            alone = [TaskStack([task], stack.device) for task in stack.tasks]
            for each in alone:
                each.batched = stack.batched
            self._unrolls = [Unroll(each, copy.deepcopy(meta), total=total, unseen=unseen) for each in alone]

    def window(self, length: int, weights: Tensor, loss_known: bool = True, last: int | None = None) -> Seen:
        """Takes some inner steps from where the last window ended.

        Args:
            length: number of inner steps.
            weights: of each task's networks, in the order of the meta-optimizer's parameters, `(tasks, weights)`.
            loss_known: whether the steps know the loss.
            last: how many losses count, the last ones; all of them if not given.
        """
        found = []
        for place, unroll in enumerate(self._unrolls):
            own = weights if len(self._unrolls) == 1 else weights[place]
            _load(unroll.meta, own)
            found.append(_followed(unroll, length, loss_known, length if last is None else last))
        return Seen(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def side_by_side(meta: MetaOptimizer) -> bool:
    """Whether networks of one shape can serve tasks of their own in one set of kernels."""
    layers = [each for each in meta.modules() if isinstance(each, nn.Linear | nn.LSTMCell)]
    inside = {id(value) for layer in layers for value in layer.parameters()}
    return meta.rule.rows_by_task and all(id(value) in inside for value in meta.parameters())


def _stacked(meta: MetaOptimizer, count: int) -> MetaOptimizer:
    whole = copy.deepcopy(meta)
    for name, module in meta.named_modules():
        if isinstance(module, nn.LSTMCell | nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, Copies([module] * count, tasks=1))
    return whole


def _load(meta: MetaOptimizer, weights: Tensor) -> None:
    """Overwrites the parameters, which have the leading dimensions of the weights in front."""
    own, start = list(meta.parameters()), 0
    with torch.no_grad():
        for each in own:
            size = each.numel() // (weights.shape[0] if weights.ndim > 1 else 1)
            each.copy_(weights[..., start : start + size].reshape(each.shape))
            start += size


def _followed(unroll: Unroll, length: int, loss_known: bool, last: int) -> Seen:
    parts: list[Seen] = []
    for done in range(0, length, _CHUNK):
        losses = unroll.window(min(_CHUNK, length - done), track=False, loss_known=loss_known)
        summed = bounded(losses.detach())[max(0, length - last - done) :].sum(0)
        parts.append(Seen(summed / last, *openness_sum(unroll.openness, like=summed, dim=0)))
    return Seen(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))
