"""What is known of elementwise activations: slopes, inverses, homogeneity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["HOMOGENEOUS", "inverse_of", "slope"]

HOMOGENEOUS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)


def slope(activation: nn.Module, z: Tensor) -> Tensor:
    """The derivative of an elementwise activation at each entry of `z`, same shape.

    Example:
        >>> slope(nn.LeakyReLU(0.1), torch.tensor([-2.0, 2.0]))
        tensor([0.1000, 1.0000])
    """
    if isinstance(activation, nn.Identity):
        return torch.ones_like(z)
    if isinstance(activation, nn.LeakyReLU):
        return torch.where(z > 0, torch.ones_like(z), activation.negative_slope)
    if isinstance(activation, nn.ReLU):
        return (z > 0).to(z.dtype)
    return torch.func.jvp(activation, (z,), (torch.ones_like(z),))[1]


def inverse_of(activation: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The inverse of an activation that is bijective on the real line; None if it is not, or not known to be.

    Example:
        >>> inverse_of(nn.LeakyReLU(0.1))(torch.tensor([-0.2, 2.0]))
        tensor([-2.,  2.])
        >>> inverse_of(nn.Tanh()) is None  # its inverse leaves the range of tanh
        True
    """
    if isinstance(activation, nn.Identity):
        return lambda y: y
    if isinstance(activation, nn.LeakyReLU) and activation.negative_slope > 0:
        return lambda y: functional.leaky_relu(y, 1 / activation.negative_slope)
    return None
