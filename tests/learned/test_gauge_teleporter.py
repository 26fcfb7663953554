"""A learned gauge as a teleport that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learned_cases import shape_of
from torch import nn

import metateleport as mt
from metateleport.checkpoint import save_checkpoint
from metateleport.families import TaskStack
from metateleport.gauges import gauge_symmetries
from metateleport.learned import GaugeTeleporter, MetaOptimizer
from metateleport.learned.gauge import GaugeChoice, LearnedGauge
from metateleport.symmetries import BatchPair2022
from metateleport.teleporters import travel


def opened(group: str) -> LearnedGauge:
    """A gauge whose gate is open and that looks at the metric alone."""
    gauge = LearnedGauge((group,), hidden=4).double()
    with torch.no_grad():
        for network in gauge.networks.values():
            network.head.weight.zero_()
            network.head.bias.copy_(torch.tensor(GaugeChoice(reach=40.0, share=-40.0, gate=40.0)))
    return gauge


def half_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum() / 2


def problem(activation: nn.Module, samples: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), activation, nn.Linear(6, 3, bias=False)).double()
    return model, torch.randn(samples, 4).double(), torch.randn(samples, 3).double()


KINDS = {
    "linear pair": (nn.Identity, 20, lambda model: mt.LinearPair(model, "0", "2"), "GL"),
    "batch pair": (lambda: nn.LeakyReLU(0.1), 6, lambda model: BatchPair2022(model, "0", "2", model[1]), "GL"),
    "rescaling": (lambda: nn.LeakyReLU(0.1), 20, lambda model: mt.Rescaling(model, "0", "2"), "diagonal"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_whitens_the_features_and_keeps_the_outputs(kind: str) -> None:
    activation, samples, make, group = KINDS[kind]
    model, x, y = problem(activation(), samples)
    symmetry = make(model)
    before = model(x).detach()
    report = mt.teleport(
        model, GaugeTeleporter(opened(group)), x, symmetries=[symmetry], loss=lambda z: half_squared_error(z, y)
    )
    assert not report.failures
    assert torch.allclose(model(x), before, atol=1e-9)
    features = model[1](model[0](x)).detach() if kind != "batch pair" else None
    if kind == "linear pair":
        covariance = features.mT @ features
        # Four inputs: the features span four directions of six, and those are even now.
        values = torch.linalg.eigvalsh(covariance)[-4:]
        assert values.max() / values.min() < 1 + 1e-6
    if kind == "rescaling":
        values = features.square().sum(0)
        assert values.max() / values.min() < 1 + 1e-6


def test_it_is_the_element_of_the_upper_side() -> None:
    """One step of descent after the teleport is the step in the gauge, undone."""
    model, x, y = problem(nn.Identity(), 20)
    stack = TaskStack([mt.Task(model, half_squared_error, (x,), (y,), [mt.LinearPair(model, "0", "2")])])
    point = stack.point_at(stack.tensors(), stack.full)
    gauge = opened("GL")
    teleporter = GaugeTeleporter(gauge)
    with torch.no_grad():
        arrived, (move,), _ = travel(teleporter, point, stack.symmetries)
        linear = gauge_symmetries(stack.symmetries, linearised=True)
        state = teleporter.initial_state(point, stack.symmetries)
        chosen, _ = gauge.choose(point, linear, state["progress"], gauge.initial_state(point, linear), True)
    (upper,) = (each for each in chosen if each.side == "in")
    assert torch.allclose(move.element, upper.element)
    there = arrived.parameters["2.weight"] - 0.1 * arrived.gradients["2.weight"]
    home = there @ move.element
    step = point.gradients["2.weight"] @ move.element.mT @ move.element
    assert torch.allclose(home, point.parameters["2.weight"] - 0.1 * step, atol=1e-9)


def test_symmetries_of_other_groups_are_left_alone() -> None:
    model, x, y = problem(nn.LeakyReLU(0.1), 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mt.teleport(
        model,
        GaugeTeleporter(opened("GL")),
        x,
        symmetries=[mt.Rescaling(model, "0", "2")],
        loss=lambda z: half_squared_error(z, y),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_with_gauges_alone_loads_as_a_teleporter(tmp_path: Path) -> None:
    shape = shape_of(stays=False, gauge="linearised", groups=("GL",), hidden=4)
    path = save_checkpoint(tmp_path / "a", MetaOptimizer(shape), None, {"name": "a", "mode": "lr+tele"})
    teleporter = mt.load(path)
    assert isinstance(teleporter, GaugeTeleporter)
    model, x, y = problem(nn.Identity(), 20)
    optimizer = mt.TeleportingOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2), model, teleporter, [mt.LinearPair(model, "0", "2")], every=2
    )
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = half_squared_error(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
