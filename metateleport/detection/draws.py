"""What a certificate is measured with: random group elements, random weights, inputs that were never seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.groups import GeneralLinear, Group

__all__ = ["fresh_inputs", "mapped", "random_element", "randomise"]

_WIDE = 128
_RANK = 32


def random_element(
    group: Group, size: float, source: torch.Generator, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    r"""An element whose generator has a given Frobenius norm, drawn on the CPU.

    Of a wide $GL(k)$ the generator is $Q T Q^\top$ with an orthonormal $Q$ of 32 columns: its exponential
    $1 + Q (e^T - 1) Q^\top$ is as dense as any other and costs $k^2$, not $k^3$.

    Args:
        group: the group.
        size: Frobenius norm of the generator.
        source: of the draw.
        dtype: of the result.
        device: of the result.

    Returns:
        One element, of the group's shape.

    Example:
        >>> from metateleport.groups import PositiveDiagonal
        >>> random_element(PositiveDiagonal(3), 0.5, torch.Generator().manual_seed(0), torch.float64).shape
        torch.Size([3])
    """
    if type(group) is GeneralLinear and group.size > _WIDE:
        drawn = torch.randn(group.size, _RANK, generator=source, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q
        small = GeneralLinear(_RANK).random(size=size, generator=source, dtype=torch.float64)
        element = basis @ (small - torch.eye(_RANK, dtype=torch.float64)) @ basis.mT
        element.diagonal().add_(1)
    elif len(group.shape) > 1:
        element = group.random(size=size, generator=source, dtype=torch.float64)
    else:
        drawn = torch.randn(group.shape, generator=source, dtype=torch.float64)
        element = group.exp(drawn * size / drawn.norm())
    return element.to(device=device, dtype=dtype)


def randomise(model: nn.Module, scale: float, seed: int) -> None:
    """Overwrites all parameters, and the running statistics of norms, with random numbers.

    Zero biases, unit gains and a zero factor of an adapter make wrong actions look right; no random point does.

    Args:
        model: the model.
        scale: of weight matrices, relative to one over the root of what a unit takes in, and of vectors.
        seed: of the draw.
    """
    sources: dict[torch.device, torch.Generator] = {}

    def source(value: Tensor) -> torch.Generator:
        if value.device not in sources:
            sources[value.device] = torch.Generator(value.device).manual_seed(seed)
        return sources[value.device]

    with torch.no_grad():
        for value in model.parameters():
            if value.is_floating_point():
                width = value.shape[1:].numel() if value.ndim > 1 else 4
                bound = scale * (3 / max(width, 1)) ** 0.5
                value.uniform_(-bound, bound, generator=source(value))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3, generator=source(buffer))
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=source(buffer))


def fresh_inputs(given: Any, seed: int) -> Any:
    """Inputs of the same shapes and types that were never seen: numbers of the same mean and spread, indices within
    the range of those given; masks and constants stay.

    Args:
        given: a tensor, or containers of tensors.
        seed: of the draw.

    Example:
        >>> fresh_inputs({"tokens": torch.tensor([3, 9, 4])}, seed=0)["tokens"].shape
        torch.Size([3])
    """
    source = torch.Generator().manual_seed(7919 + seed)

    def fresh(value: Tensor) -> Tensor:
        if value.dtype is torch.bool or not value.numel():
            return value
        low, high = value.min(), value.max()
        if bool(low == high) or bool(((value == low) | (value == high)).all() & (value.numel() > 2)):
            return value
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=source, dtype=torch.float64).to(value)
            return value.mean() + value.std() * drawn
        if value.is_complex():
            return value
        return torch.randint(int(low), int(high) + 1, value.shape, generator=source, dtype=value.dtype).to(value.device)

    return mapped(given, fresh)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Containers with every tensor in them exchanged for what a function makes of it.

    Example:
        >>> mapped((torch.ones(1), {"flag": True}), torch.neg)
        (tensor([-1.]), {'flag': True})
    """
    return torch.utils._pytree.tree_map_only(Tensor, function, value)
