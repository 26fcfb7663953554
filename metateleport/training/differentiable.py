"""The differentiable twin of the learned optimizer, for unrolls through `higher`: the one module that imports it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import higher
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metateleport.families import TaskStack
from metateleport.families.probed import ProbedLosses
from metateleport.linalg import certain
from metateleport.training.stack_optimizer import StackOptimizer

__all__ = ["DifferentiableLearnedOptimizer", "unroll_context"]


class DifferentiableLearnedOptimizer(higher.optim.DifferentiableOptimizer):
    """Takes the learned optimizer's steps inside a graph, so that an unroll can be differentiated.

    Made by `higher` for a `StackOptimizer`; its model is a patched `TaskStack`.

    Example:
        >>> from metateleport.training.stack_optimizer import StackOptimizer
        >>> StackOptimizer in higher.optim._opt_mapping
        True
    """

    def __init__(self, other: StackOptimizer, *args: Any, **keywords: Any) -> None:
        super().__init__(other, *args, **keywords)
        self.loop = dataclasses.replace(other.loop)
        self.loss_known, self.first_order = other.loss_known, other.first_order

    def step(self, loss: ProbedLosses, params: Any = None, **keywords: Any) -> list[Tensor]:
        """One inner step.

        Args:
            loss: what the patched model gave with `probe=True`, at its fast weights of now.
            params: of `higher`; not taken.
            keywords: overrides and callbacks of `higher`; not taken.

        Returns:
            The fast weights after the step.

        Raises:
            TypeError: if it is given anything else, losses alone for example.
            ValueError: if they were seen at other weights, or for `higher`'s overrides and callbacks, which have no
                meaning for a learned optimizer.
        """
        if params is not None or any(value is not None for value in keywords.values()):
            raise ValueError(
                "a learned optimizer steps its patched model: params, override and callbacks are not taken"
            )
        model: Any = self._fmodel
        seen = ProbedLosses.checked(loss, dict(zip(model.names, model.fast_params, strict=True)))
        point = seen.point(self._track_higher_grads, self._track_higher_grads and not self.first_order)
        # Untracked, the networks' states would still tie all steps of an unroll together.
        with torch.set_grad_enabled(self._track_higher_grads):
            taken = self.loop.advance(point, self.loss_known)
        moved = [taken.parameters[name] for name in model.names]
        if not self._track_higher_grads:
            moved = [value.detach().requires_grad_() for value in moved]
        else:
            moved = list(_Bounded.apply(*(value.detach() for value in model.fast_params), *moved))
        model.update_params(moved)
        return list(model.fast_params)

    def _update(self, grouped_grads: Any, **keywords: Any) -> None:
        # Abstract in `higher`, which calls it from its own step().
        raise NotImplementedError("a learned optimizer does not step from gradients alone: use step()")


class _Bounded(torch.autograd.Function):
    """The identity; its backward pass bounds each task's contribution to the meta-gradient.

    A task that diverges later, or stands where the loss is extremely steep, would dominate the meta-gradient of its
    whole stack, as the meta-gradient is clipped only as a whole. Bounded is the derivative of the meta-loss in the
    length of the step. It is scale-free, of order one in a healthy unroll, and does not see parts that cancel along an
    orbit. Values that are not finite are set to zero.
    """

    LARGEST = 100.0

    @staticmethod
    def forward(context: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        before, after = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        context.save_for_backward(_side_by_side(after).sub_(_side_by_side(before)))
        return tuple(value.view_as(value) for value in after)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (steps,) = context.saved_tensors
        whole = _side_by_side(gradients)
        along = (whole * steps).sum(1)
        # What is not finite makes its sum so; a sum that overflows of finite terms counts as one that is not.
        finite = along.isfinite() & whole.sum(1).isfinite()
        if certain(finite & (along.abs() <= _Bounded.LARGEST)):
            return (*(None for _ in gradients), *gradients)
        tiny = torch.finfo(along.dtype).tiny
        scale = (_Bounded.LARGEST / along.abs().clamp_min(tiny)).clamp_max(1.0)
        bounded = torch.where(finite.unsqueeze(1), whole, 0.0) * torch.where(finite, scale, 0.0).unsqueeze(1)
        parts = bounded.split([value[0].numel() for value in gradients], 1)
        placed = [part.reshape(value.shape).to(value.dtype) for part, value in zip(parts, gradients, strict=True)]
        return (*(None for _ in gradients), *placed)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of each task in one row, `(tasks, entries)`."""
    return torch.cat([value.flatten(1) for value in tensors], 1)


higher.register_optim(StackOptimizer, DifferentiableLearnedOptimizer)


@contextlib.contextmanager
def unroll_context(
    model: TaskStack, optimizer: StackOptimizer, track: bool = True
) -> Iterator[tuple[Any, DifferentiableLearnedOptimizer]]:
    """`higher.innerloop_ctx` for a stack of tasks.

    Args:
        model: the stack, at the parameters to start from.
        optimizer: the learned optimizer over it, in the state to start from.
        track: keep the graph for the meta-gradient.

    Yields:
        The patched model and the differentiable optimizer.
    """
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=track) as (patched, differentiable):
        yield patched, differentiable
