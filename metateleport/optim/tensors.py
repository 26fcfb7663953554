"""A model's parameters as the meta-optimizer takes them: a stack of one task, in one working precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["dense_gradient", "master", "raised", "trainable", "within", "working_dtype", "write"]

_SMALLEST = 0.02
"""Stands for the root mean square of tensors that are smaller, as a bound on their steps."""

COMPENSATION = "compensation"
"""Entry of a parameter's state: what rounding to half precision has cut off."""


def trainable(parameter: Tensor) -> bool:
    """Whether a step can be taken along a parameter now: it has a gradient, and entries.

    Example:
        >>> trainable(nn.Parameter(torch.ones(2)))
        False
    """
    return parameter.grad is not None and parameter.requires_grad and parameter.numel() > 0


def working_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """What steps are computed in: float64 where a parameter is of it, else float32.

    Example:
        >>> working_dtype({"w": torch.ones(1, dtype=torch.bfloat16)})
        torch.float32
    """
    wide = any(value.dtype in (torch.float64, torch.complex128) for value in parameters.values())
    return torch.float64 if wide else torch.float32


def raised(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the working precision with a task dimension in front: complex numbers as pairs, a number as a vector.

    Args:
        tensor: a parameter or its gradient, detached.
        dtype: the working precision.

    Returns:
        `(1, *shape)`, of at least two dimensions; a view where nothing has to be converted.

    Example:
        >>> raised(torch.ones(3, dtype=torch.complex64), torch.float32).shape
        torch.Size([1, 3, 2])
    """
    if tensor.is_complex():
        # A tensor may carry its conjugation as a mark, which has no view as pairs.
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    return tensor.to(dtype).unsqueeze(0)


def dense_gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient, whole: a sparse one has zeros where it says nothing."""
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    return gradient.to_dense() if gradient.layout != torch.strided else gradient


def write(parameter: Tensor, value: Tensor, state: dict[str, Tensor]) -> None:
    """Writes a value of the working precision into a parameter.

    In half precision a step is often smaller than the spacing of the numbers, and would be lost: what rounding cuts off
    is kept, in half precision too, and `master` adds it again (Kahan's summation).

    Args:
        parameter: overwritten.
        value: `(1, *shape)`, as `raised` gives it.
        state: of the parameter; gets the entry `compensation` in half precision.
    """
    flat = value.squeeze(0)
    if parameter.is_complex():
        parameter.copy_(torch.view_as_complex(flat.contiguous()).reshape(parameter.shape))
        return
    flat = flat.reshape(parameter.shape)
    parameter.copy_(flat)
    if parameter.dtype in (torch.float16, torch.bfloat16):
        state[COMPENSATION] = (flat - parameter.to(flat.dtype)).to(parameter.dtype)


def within(start: Tensor, value: Tensor) -> Tensor:
    """A step no longer than its tensor: a bound on the curvature can be far too low where a layer starts near zero.

    Args:
        start: where the step starts, `(1, *shape)`.
        value: where it leads.

    Example:
        >>> within(torch.ones(1, 2), torch.full((1, 2), 5.0))
        tensor([[2., 2.]])
    """
    step = value - start
    size, allowed = step.norm(), start.norm().clamp_min(_SMALLEST * start.numel() ** 0.5)
    return value if bool(size <= allowed) else start + step * (allowed / size)


def master(parameter: nn.Parameter, dtype: torch.dtype, state: Mapping[str, Tensor]) -> Tensor:
    """A parameter in the working precision, `(1, *shape)`, with what rounding had cut off."""
    value = raised(parameter.detach(), dtype)
    kept = state.get(COMPENSATION)
    return value if kept is None else value + raised(kept, dtype)
