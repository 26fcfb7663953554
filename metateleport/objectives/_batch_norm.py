"""Batch norm that is differentiable in its running statistics too, which torch's is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["DifferentiableBatchNorm"]


class DifferentiableBatchNorm(TorchFunctionMode):
    """While it is entered, running statistics that stand in a graph pass their gradients on.

    A symmetry that moves them puts them into the graph of the group element.

    Example:
        >>> mean = torch.zeros(2, requires_grad=True)
        >>> with DifferentiableBatchNorm():
        ...     out = torch.nn.functional.batch_norm(torch.ones(3, 2), mean, torch.ones(2), eps=0.0)
        >>> torch.autograd.grad(out.sum(), mean)[0]
        tensor([-3., -3.])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or mean is None or variance is None:
        # The output does not depend on them; they are updated in place, which no graph allows.
        mean, variance = (None if value is None else value.detach().clone() for value in (mean, variance))
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return x * scale.reshape(shape) + shift.reshape(shape)
