"""Keeps a task whose derivatives are not finite from spoiling the meta-gradient of its stack."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["finite_gradient"]


def finite_gradient(tensor: Tensor) -> Tensor:
    """The tensor as it is; backwards, entries of its gradient that are not finite become zero.

    Put where the rows of single tasks leave a network: the derivative of a factorisation can be infinite in a task
    (a matrix that has lost its rank) that is of no use to the others.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> (finite_gradient(x) * torch.tensor([2.0, float("inf")])).sum().backward()
        >>> x.grad
        tensor([2., 0.])
    """
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor)
        tensor.register_hook(_finite)
    return tensor


def _finite(gradient: Tensor) -> Tensor:
    return torch.where(gradient.isfinite(), gradient, 0.0)
