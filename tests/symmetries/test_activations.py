"""Activations: slopes, inverses, and which are homogeneous."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metateleport.symmetries import HOMOGENEOUS, inverse_of, slope
from metateleport.symmetries.activations import pulled_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "activation",
    [
        nn.Identity(),
        nn.ReLU(),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.3),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.ELU(),
        nn.Softplus(),
    ],
    ids=repr,
)
def test_slopes_are_those_of_autograd(activation: nn.Module, dtype: torch.dtype) -> None:
    z = torch.randn(50, dtype=dtype, requires_grad=True)
    z.data[0] = 0.0
    (expected,) = torch.autograd.grad(activation(z).sum(), z)
    for value in (None, activation(z).detach()):
        found = slope(activation, z.detach(), value)
        assert found.dtype == dtype
        assert torch.allclose(found, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.LeakyReLU(0.1), nn.Tanh(), nn.GELU()], ids=repr)
def test_cotangents_are_pulled_back_as_by_autograd(activation: nn.Module) -> None:
    torch.manual_seed(0)
    z = torch.randn(50, dtype=torch.float64, requires_grad=True)
    cotangent, weights = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (expected,) = torch.autograd.grad(activation(z), z, cotangent, create_graph=True)
    found = pulled_back(activation, cotangent, z)
    assert torch.allclose(found, expected, rtol=1e-14)
    both = [torch.autograd.grad(each, cotangent, weights)[0] for each in (found, expected)]
    assert torch.allclose(*both, rtol=1e-14)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.LeakyReLU(0.1), nn.LeakyReLU(3.0)], ids=repr)
def test_inverses_undo_both_ways(activation: nn.Module) -> None:
    z = torch.randn(50, dtype=torch.float64)
    inverse = inverse_of(activation)
    assert inverse is not None
    assert torch.allclose(inverse(activation(z)), z, rtol=1e-14)
    assert torch.allclose(activation(inverse(z)), z, rtol=1e-14)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.1), nn.Tanh(), nn.GELU()], ids=repr
)
def test_no_inverse_is_claimed_where_there_is_none(activation: nn.Module) -> None:
    assert inverse_of(activation) is None


@pytest.mark.parametrize("kind", HOMOGENEOUS)
def test_homogeneous_activations_are(kind: type[nn.Module]) -> None:
    activation = kind().double()
    z = torch.randn(20, dtype=torch.float64)
    assert torch.allclose(activation(2.5 * z), 2.5 * activation(z), rtol=1e-14)
