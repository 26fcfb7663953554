"""The mixture without a network: it is `adaptive` with constants, by what a tensor is."""

from __future__ import annotations

import math

import pytest
import torch
from gallery_cases import load
from learned_cases import backward, mlp
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.meta_optimizer import InnerLoop
from metateleport.learned.rules.adaptive import TOLD_START, AdaptiveSettings
from metateleport.learned.rules.static import StaticRule, StaticSettings
from metateleport.point import Point
from metateleport.training.particles import Particles


def meta_optimizer(settings: AdaptiveSettings | StaticSettings | None = None) -> MetaOptimizer:
    torch.manual_seed(0)
    settings = settings or StaticSettings(cooling=0.01, guarded=True)
    return MetaOptimizer(MetaOptimizerConfig(settings, teleport=None)).double()


def losses(meta: MetaOptimizer, stack: TaskStack, steps: int = 12) -> Tensor:
    parameters = {name: value.detach() for name, value in stack.tensors().items()}
    loop, along = InnerLoop(meta, (), False, total=steps), []
    with torch.no_grad():
        for step in range(steps):
            point = stack.point_at(parameters, stack.batch(step))
            assert point.loss is not None
            along.append(point.loss)
            parameters = loop.advance(point, False, False).parameters
    return torch.stack(along)


def stacked(name: str = "residual_digits") -> TaskStack:
    return load(name, {"samples": 60, "batch": 20}).stack(range(2), dtype=torch.float64)


def test_untrained_it_takes_the_steps_of_untrained_networks_that_are_told() -> None:
    networks = meta_optimizer(AdaptiveSettings(hidden=3, cooling=0.01, told=True, guarded=True))
    torch.testing.assert_close(losses(meta_optimizer(), stacked()), losses(networks, stacked()), rtol=1e-12, atol=0.0)


def test_what_a_tensor_is_does_not_change_along_a_run() -> None:
    stack, meta = stacked(), meta_optimizer()
    with torch.no_grad():
        meta.rule.get_parameter("head.weight").normal_()
    loop, seen = InnerLoop(meta, (), False, total=5), []
    parameters = {name: value.detach() for name, value in stack.tensors().items()}
    with torch.no_grad():
        for step in range(5):
            parameters = loop.advance(stack.point_at(parameters, stack.batch(step)), False, False).parameters
            assert loop.state is not None
            seen.append(loop.state.rule["kinds"])
    assert all(torch.equal(seen[0][name], seen[-1][name]) for name in parameters)
    assert "cells" not in loop.state.rule


def test_the_features_are_those_of_the_tensor() -> None:
    values = {
        "a.weight": torch.full((1, 8, 2), 0.5),
        "a.bias": torch.full((1, 8), 0.5),
        "b.weight": torch.ones(1, 1, 8),
    }
    point = Point(values, gradients=values, loss=torch.ones(1))
    kinds = StaticRule().initial_state(point)["kinds"]
    heavy = math.log(0.5) / 2 / 3
    depth = math.log(2) / 3
    expected = {
        "a.weight": [heavy, 0.0, 0.0, math.log(4) / 5, math.log(2) / 5, depth],
        "a.bias": [heavy, 1.0, 1.0, 0.0, 0.0, depth],
        "b.weight": [-heavy, 0.0, 0.0, math.log(1 / 8) / 5, math.log(8) / 5, depth],
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(kinds[name], torch.tensor([wanted]), msg=name)


@pytest.mark.parametrize("place", range(6))
def test_a_length_may_go_with_any_feature(place: int) -> None:
    meta, stack = meta_optimizer(), stacked()
    before = losses(meta, stack, 3)
    with torch.no_grad():
        meta.rule.get_parameter("head.weight")[0, place] = 0.5
    after = losses(meta, stack, 3)
    assert not torch.allclose(before[1:], after[1:])
    assert meta.rule.get_parameter("head.bias").tolist() == pytest.approx(TOLD_START)


def test_tasks_with_rules_of_their_own_go_side_by_side() -> None:
    meta = meta_optimizer()
    weights = nn.utils.parameters_to_vector(meta.parameters()).detach()
    longer = weights.clone()
    longer[-len(TOLD_START)] += 0.5
    stack = load("digits", {"samples": 60, "batch": 20}).stack([0, 0], dtype=torch.float64)
    found = Particles(stack, meta, total=8).window(8, torch.stack((weights, longer))).losses
    alone = Particles(load("digits", {"samples": 60, "batch": 20}).stack([0], dtype=torch.float64), meta, total=8)
    torch.testing.assert_close(alone.window(8, longer.unsqueeze(0)).losses, found[1:])
    assert bool(found[0] != found[1])


def test_a_saved_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def made() -> tuple[nn.Module, mt.LearnedOptimizer]:
        model = mlp()
        return model, mt.LearnedOptimizer(model, meta_optimizer(), total_steps=6)

    (model, optimizer), (other, resumed) = made(), made()
    for step in range(6):
        if step == 3:
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(optimizer.state_dict())
        backward(model, step)
        optimizer.step()
        if step >= 3:
            backward(other, step)
            resumed.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_table_of_a_vocabulary_has_no_polar_factor() -> None:
    def step_of(rows: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(rows, 4), nn.Linear(4, 4)).double()
        before = model[0].weight.detach().clone()
        optimizer = mt.LearnedOptimizer(model, meta_optimizer(StaticSettings()))
        model(torch.arange(8)).square().mean().backward()
        optimizer.step()
        return (model[0].weight.detach() - before)[8:]

    assert bool(step_of(64).abs().max() < 1e-12), "rows without a gradient stay, whatever the direction"
    rule = StaticRule()
    values = {"0.weight": torch.ones(1, 8192, 4)}
    seen: list[int] = []
    rule.polar = lambda tensors: seen.append(len(tensors)) or list(tensors)  # type: ignore[assignment,return-value]
    for name, shape in (("table", (8192, 4)), ("matrix", (8192, 400)), ("small", (64, 1))):
        values = {f"{name}.weight": torch.ones(1, *shape)}
        point = Point(values, gradients=values, loss=torch.ones(1))
        seen.clear()
        progress = InnerLoop(meta_optimizer()).meta.initial_state(point, ()).progress.unjudged()
        with torch.no_grad():
            rule.step(point, (), progress, rule.initial_state(point))
        assert bool(seen) == (name != "table"), name
