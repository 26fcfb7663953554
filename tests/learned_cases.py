"""A small model with data, and steps on it, shared by the tests of the learned optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.learned import (
    GaugeSettings,
    LearnedTeleporter,
    MetaOptimizer,
    MetaOptimizerConfig,
    TeleportSettings,
)
from metateleport.learned.rules import known_rules, read_rule
from metateleport.papers.flat import FlatSettings


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


def shape_of(mode: str = "lr+tele", hidden: int = 32, **given: Any) -> MetaOptimizerConfig:
    """The shape of a meta-optimizer by its mode, all of whose parts have `hidden` units.

    Args:
        mode: one of `MODES`.
        hidden: units of all LSTMs.
        given: `update`, the kind of rule of a mode that learns one; `shapes` for the source paper's networks; `stays`,
            `gauge`, `groups`, `max_stretch`, `metric_memory`; `base` and `base_lr` of mode `tele`; and the rule's own.
            What a rule of another kind has is left out, so that a test can go over modes.
    """
    step, tele = mode.removesuffix("+tele"), "tele" in mode
    kind = {"lr": "lr", "tele": "base"}.get(step, given.pop("update", "coordinate"))
    shapes = given.pop("shapes", ())
    teleport = TeleportSettings(hidden, given.pop("max_stretch", None)) if tele and given.pop("stays", True) else None
    name, memory = given.pop("gauge", "none"), given.pop("metric_memory", 0.95)
    gauge = GaugeSettings(name, hidden, memory) if tele and name != "none" else None
    groups = given.pop("groups", MetaOptimizerConfig.groups)
    if shapes and kind != "base":
        rule: Any = FlatSettings(shapes, hidden, per_coordinate=step == "update")
    else:
        own = {"hidden": hidden, **given, "optimizer": given.get("base", "sgd"), "lr": given.get("base_lr", 1e-3)}
        rule = read_rule({"kind": kind, **{name: own[name] for name in known_rules()[kind].names() if name in own}})
    return MetaOptimizerConfig(rule, teleport, gauge, groups)


def meta_of(**config: Any) -> MetaOptimizer:
    """A meta-optimizer for minibatches that has learned nothing: it starts with sensible steps."""
    torch.manual_seed(3)
    return MetaOptimizer(shape_of(**{"mode": "update", "update": "adaptive", "hidden": 4, **config}))


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
