"""The differentiable twin of the learned optimizer, for unrolls through `higher`: the one module that imports it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import higher
import torch
from torch import Tensor

from metateleport.learned.meta_optimizer import MetaOptimizer, MetaState, Step
from metateleport.learned.optimizer import StackOptimizer
from metateleport.stack import StackedModel

__all__ = ["DifferentiableLearnedOptimizer", "unroll_context"]


class DifferentiableLearnedOptimizer(higher.optim.DifferentiableOptimizer):
    """Takes the learned optimizer's steps inside a graph, so that an unroll can be differentiated.

    Made by `higher` for a `StackOptimizer`; its model is a patched `StackedModel` whose last forward pass was run
    with `probe=True`.

    Example:
        >>> from metateleport.learned.optimizer import StackOptimizer
        >>> StackOptimizer in higher.optim._opt_mapping
        True
    """

    def __init__(self, other: StackOptimizer, *args: Any, **keywords: Any) -> None:
        super().__init__(other, *args, **keywords)
        self.meta: MetaOptimizer = other.meta
        self.symmetries = other.symmetries
        self.meta_state: MetaState | None = other.meta_state
        self.deterministic = other.deterministic
        self.first_order = other.first_order
        self.last_step: Step | None = None

    def step(self, loss: Tensor, params: Any = None, **keywords: Any) -> list[Tensor]:
        """One inner step; `loss` is the stack's losses or their sum, already in the recorded evaluation.

        Raises:
            ValueError: for `higher`'s overrides and callbacks, which have no meaning for a learned optimizer.
            RuntimeError: if the forward pass was not probed.
        """
        if params is not None or any(value is not None for value in keywords.values()):
            raise ValueError(
                "a learned optimizer steps its patched model: params, override and callbacks are not taken"
            )
        if self._fmodel is None or self._fmodel.evaluation is None:
            raise RuntimeError("run the patched model with probe=True before the step")
        self._update([])
        return list(self._fmodel.fast_params)

    def _update(self, grouped_grads: Any, **keywords: Any) -> None:
        model = self._fmodel
        point = model.evaluation.point(self._track_higher_grads, self._track_higher_grads and not self.first_order)
        # Untracked, the networks' states would still tie all steps of an unroll together.
        with torch.set_grad_enabled(self._track_higher_grads):
            if self.meta_state is None:
                self.meta_state = self.meta.initial_state(point, self.symmetries, self.deterministic)
            taken = self.meta.step(point, self.symmetries, self.meta_state)
        self.meta_state, self.last_step = taken.state, taken
        moved = [taken.parameters[name] for name in model.names]
        if not self._track_higher_grads:
            moved = [value.detach().requires_grad_() for value in moved]
        else:
            for value in moved:
                if value.requires_grad:
                    value.register_hook(_of_finite_tasks)
        model.update_params(moved)


def _of_finite_tasks(gradient: Tensor) -> Tensor:
    """A gradient without the tasks in which it is not finite: what diverges later on teaches the networks nothing."""
    finite = gradient.isfinite().flatten(1).all(-1)
    return torch.where(finite.reshape(-1, *(1,) * (gradient.ndim - 1)), gradient, 0.0)


higher.register_optim(StackOptimizer, DifferentiableLearnedOptimizer)


@contextlib.contextmanager
def unroll_context(
    model: StackedModel, optimizer: StackOptimizer, track: bool = True
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
