"""Muon, on a whole stack of tasks at once: polar factors of momenta, by Newton-Schulz iterations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method
from metateleport.families import TaskStack

__all__ = ["RIVALS", "StackedMuon", "muon"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7


class StackedMuon(torch.optim.Optimizer):
    r"""`torch.optim.Muon` on tensors whose last two dimensions are matrices; others are stepped as AdamW does.

    Torch's own takes single matrices only. The iterations are as its, in the tensors' own precision and not in
    bfloat16, and the lengths are those of `adjust_lr_fn="match_rms_adamw"`, with which AdamW's tensors can have the
    same `lr`: $0.2\, \mathrm{lr} \sqrt{\max(m, n)}$.

    Args:
        parameters: pairs of a tensor and whether it is a stack of matrices.
        lr: step size.
        momentum: memory of the momentum, Nesterov's.

    Example:
        >>> weights = nn.Parameter(torch.zeros(5, 3, 4))
        >>> optimizer = StackedMuon([(weights, True)], lr=0.1)
        >>> weights.grad = torch.ones(5, 3, 4)
        >>> _ = optimizer.step()
        >>> bool((weights < 0).all())
        True

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is
    scalable for LLM training" (arXiv 2502.16982).
    """

    def __init__(self, parameters: list[tuple[Tensor, bool]], lr: float, momentum: float = 0.95) -> None:
        matrices = [value for value, matrix in parameters if matrix]
        others = [value for value, matrix in parameters if not matrix]
        groups = [{"params": own, "matrix": matrix} for own, matrix in ((matrices, True), (others, False)) if own]
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        # AdamW on the others; its step sizes are this one's.
        self._adamw = torch.optim.AdamW(others, lr=lr, weight_decay=0.0) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["matrix"]:
                assert self._adamw is not None
                self._adamw.param_groups[0]["lr"] = group["lr"]
                self._adamw.step()
                continue
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state["momentum"] = torch.zeros_like(value)
                state["momentum"].lerp_(value.grad, 1 - group["momentum"])
                update = value.grad.lerp(state["momentum"], group["momentum"])
                length = 0.2 * math.sqrt(max(value.shape[-2:]))
                value.add_(_orthogonalised(update), alpha=-group["lr"] * length)
        return loss


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly the polar factors of `(..., m, n)`; zero where a matrix is zero."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(_EPS)
    for _ in range(_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.mT if tall else wide


def muon(model: nn.Module, lr: float, momentum: float = 0.95) -> torch.optim.Optimizer:
    """Muon on the trained matrices of a stack of tasks or of a model, AdamW on its other parameters."""
    tasks = int(isinstance(model, TaskStack))
    trained = [value for value in model.parameters() if value.requires_grad]
    return StackedMuon([(value, value.ndim - tasks == 2) for value in trained], lr, momentum)


def _muon(**settings: Any) -> Method:
    return Scheduled("muon", muon, **settings)


RIVALS = (
    Rival(
        "muon",
        _muon,
        Lattice(-4, -1),
        {"decay": Choice(DECAYS), "momentum": Choice((0.95, 0.9))},
        on_request=True,
        fair=True,
    ),
)
