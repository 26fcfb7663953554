"""A small model with data, and steps on it, shared by the tests of the learned optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.learned import LearnedTeleporter, MetaOptimizer, MetaOptimizerConfig


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Two layers, of 3, 5 and 2 units."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2)).to(dtype)


def batch(seed: int = 1, samples: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets of `mlp`."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=source, dtype=torch.float64)
    return x.to(dtype), torch.stack((x[:, 0] - x[:, 1], x[:, 2].square()), 1).to(dtype)


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    x, y = batch(seed, dtype=next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def backward(model: nn.Module, seed: int = 1) -> Tensor:
    """Puts gradients where there were none; the loss."""
    model.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return loss.detach()


def meta_of(**config: Any) -> MetaOptimizer:
    """A meta-optimizer for minibatches that has learned nothing: it starts with sensible steps."""
    torch.manual_seed(3)
    return MetaOptimizer(MetaOptimizerConfig(**{"mode": "update", "update": "adaptive", "hidden": 4, **config}))


def teleporting(**config: Any) -> MetaOptimizer:
    """A meta-optimizer whose teleport is large enough to be seen."""
    meta = meta_of(**{"mode": "update+tele", "groups": ("diagonal",), **config})
    assert isinstance(meta.teleporter, LearnedTeleporter)
    with torch.no_grad():
        for each in meta.teleporter.networks.values():
            each.head.bias[-1] = 0.0
            each.head.weight.copy_((torch.rand(each.head.weight.shape) - 0.5) / 4)
    return meta


def trained(model: nn.Module, optimizer: mt.LearnedOptimizer, steps: int, seed: int = 10) -> Iterator[Tensor]:
    """Steps on minibatches without a loss; the weights after each."""
    for number in range(steps):
        backward(model, seed + number)
        optimizer.step()
        yield weights(model)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().to(torch.float64) for value in model.parameters()])
