"""Properties of elementwise activations: slopes, inverses, homogeneity."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["HOMOGENEOUS", "activation_of", "inverse_of", "pulled_back", "slope"]

HOMOGENEOUS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)


def slope(activation: nn.Module, z: Tensor, value: Tensor | None = None) -> Tensor:
    """The derivative of an elementwise activation at each entry of `z`, same shape.

    Args:
        activation: the activation.
        z: where.
        value: the activation there, where it is known already: tanh and the sigmoid have their slope from it.

    Example:
        >>> slope(nn.LeakyReLU(0.1), torch.tensor([-2.0, 2.0]))
        tensor([0.1000, 1.0000])
    """
    if isinstance(activation, nn.Identity):
        return torch.ones_like(z)
    if isinstance(activation, (nn.LeakyReLU, nn.ReLU)):
        return pulled_back(activation, torch.ones_like(z), z)
    if isinstance(activation, nn.Tanh):
        value = activation(z) if value is None else value
        return 1 - value.square()
    if isinstance(activation, nn.Sigmoid):
        value = activation(z) if value is None else value
        return value * (1 - value)
    return torch.func.jvp(activation, (z,), (torch.ones_like(z),))[1]


def pulled_back(activation: nn.Module, cotangent: Tensor, z: Tensor, value: Tensor | None = None) -> Tensor:
    """The cotangent on `z` of a cotangent on an elementwise activation's output: the one times the slope.

    Args:
        activation: the activation.
        cotangent: on its output.
        z: where.
        value: the activation there, where it is known already.

    Example:
        >>> pulled_back(nn.LeakyReLU(0.1), torch.tensor([3.0, 3.0]), torch.tensor([-2.0, 2.0]))
        tensor([0.3000, 3.0000])
    """
    # One operation, as in torch's own backward pass; a selection and a product take ten times as long.
    if isinstance(activation, nn.LeakyReLU):
        slopes: Tensor = torch.ops.aten.leaky_relu_backward(cotangent, z.detach(), activation.negative_slope, False)
        return slopes
    if isinstance(activation, nn.ReLU):
        passed: Tensor = torch.ops.aten.threshold_backward(cotangent, z.detach(), 0)
        return passed
    return cotangent * slope(activation, z, value)


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


def activation_of(
    name: str, arguments: Sequence[float] = (), keywords: Mapping[str, str] | None = None
) -> nn.Module | None:
    """The module of an elementwise operation, however it is called; None if it is not elementwise, or not known to be.

    Args:
        name: of the operation, as in `torch.ops.aten`.
        arguments: what stands behind its input.
        keywords: its keyword arguments.

    Example:
        >>> activation_of("leaky_relu", (0.1,))
        LeakyReLU(negative_slope=0.1)
        >>> activation_of("softmax", (-1,)) is None
        True
    """
    found: nn.Module | None = None
    # What an activation does not take means more than the activation alone.
    with contextlib.suppress(TypeError):
        if name in _ELEMENTWISE:
            found = _ELEMENTWISE[name](*arguments, **(keywords or {}))
    return found


def _number(kind: Callable[[float], nn.Module], usual: float) -> Callable[..., nn.Module]:
    """Makes an activation of one number, and of no more."""
    return lambda number=usual: kind(number)


def _plain(kind: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    """Makes an activation of no number; what its module takes besides (`inplace`) is none of the operation's."""
    return lambda: kind()  # noqa: PLW0108


_ELEMENTWISE: dict[str, Callable[..., nn.Module]] = {
    "celu": _number(nn.CELU, 1.0),
    "elu": _number(nn.ELU, 1.0),
    "gelu": lambda *, approximate="none": nn.GELU(approximate),
    "hardsigmoid": _plain(nn.Hardsigmoid),
    "hardswish": _plain(nn.Hardswish),
    "hardtanh": lambda low=-1.0, high=1.0: nn.Hardtanh(low, high),
    "leaky_relu": _number(nn.LeakyReLU, 0.01),
    "log_sigmoid": _plain(nn.LogSigmoid),
    "mish": _plain(nn.Mish),
    "relu": _plain(nn.ReLU),
    "relu6": _plain(nn.ReLU6),
    "selu": _plain(nn.SELU),
    "sigmoid": _plain(nn.Sigmoid),
    "silu": _plain(nn.SiLU),
    "softplus": lambda beta=1.0, threshold=20.0: nn.Softplus(beta, threshold),
    "tanh": _plain(nn.Tanh),
}
"""By the operation's name, takes the arguments behind its input."""
