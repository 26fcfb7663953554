"""Other optimizers in the place of the learned one: AdamW, as the contract is torch's own, and those made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt

__all__ = ["ADAMW", "GAUGED", "Gauged", "StandIn"]

ADAMW = "adamw"
"""The name that stands for it among the checkpoints."""
GAUGED = "gauged"
"""The name that stands for `metateleport.GaugedOptimizer`."""
_STEP = 0.02


class StandIn(torch.optim.AdamW):
    """AdamW with the signature of `metateleport.LearnedOptimizer`, dense gradients and its way of skipping steps."""

    # Of the class, as torch's optimizers pickle nothing but groups and state.
    skipped = 0

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        symmetries: Any = None,
        example_input: Any = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        held = model_or_params.parameters() if isinstance(model_or_params, nn.Module) else model_or_params
        super().__init__(held, lr=lr, weight_decay=weight_decay, eps=1e-4)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, loss: Any = None) -> Any:  # type: ignore[override]
        """One step of AdamW at a fiftieth of `lr`; none at all where the loss or a gradient is not finite."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [value for group in self.param_groups for value in group["params"] if value.grad is not None]
        for value in held:
            if value.grad.is_sparse:
                value.grad = value.grad.to_dense()
        finite = all(bool(torch.isfinite(value.grad).all()) for value in held)
        if not finite or (loss is not None and not bool(torch.isfinite(torch.as_tensor(loss)))):
            self.skipped += 1
            return loss
        kept = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group in self.param_groups:
            group["lr"], group["weight_decay"] = group["lr"] * _STEP, group["weight_decay"] / _STEP
        super().step()
        for group, (lr, decay) in zip(self.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
        return loss


class Gauged(mt.GaugedOptimizer):
    """`metateleport.GaugedOptimizer` with the signature of `metateleport.LearnedOptimizer`, at a fiftieth of `lr`."""

    def __init__(self, model_or_params: nn.Module | Iterable[Any], lr: float = 1.0, **settings: Any) -> None:
        super().__init__(model_or_params, lr=lr, **settings)

    def step(self, closure: Callable[[], Tensor] | None = None, *, loss: Any = None) -> Any:
        kept = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group in self.param_groups:
            group["lr"], group["weight_decay"] = group["lr"] * _STEP, group["weight_decay"] / _STEP
        value = super().step(closure, loss=loss)
        for group, (lr, decay) in zip(self.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
        return value
