"""Gauges that are held: the same steps where none is held long, no decomposition while one is, and when that ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import Tensor, nn

import metateleport as mt
from metateleport.gauges import Gauge, gauge_symmetries, precondition
from metateleport.learned import MetaOptimizer
from metateleport.learned.curvature import largest_of
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.progress import Progress
from metateleport.learned.refresh import Refresh, Renewed, held_gauge
from metateleport.point import Point

NEVER = {"little": 0.0, "much": -1.0}
ALWAYS = {"little": float("inf"), "much": float("inf")}


def perceptron(width: int = 6) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, width), nn.LeakyReLU(0.1), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    )
    return model.double(), torch.randn(20, 4).double(), torch.randn(20, 2).double()


def optimizer_of(model: nn.Module, refresh: Refresh | None, deterministic: bool = False) -> mt.LearnedOptimizer:
    torch.manual_seed(1)
    meta = MetaOptimizer(shape_of(stays=False, gauge="linearised", hidden=6)).double()
    optimizer = mt.LearnedOptimizer(model, meta, deterministic=deterministic)
    assert meta.gauge is not None
    assert meta.gauge.refresh is None
    assert optimizer.meta.gauge is not None
    optimizer.meta.gauge.refresh = refresh
    return optimizer


def steps(refresh: Refresh | None, count: int = 8, deterministic: bool = False) -> Iterator[tuple[Tensor, Any]]:
    model, inputs, targets = perceptron()
    optimizer = optimizer_of(model, refresh, deterministic)
    for number in range(count):
        rows = slice(None) if deterministic else slice(10 * (number % 2), 10 * (number % 2) + 10)

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs[rows]) - targets[rows]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert optimizer.loop.state is not None
        yield torch.cat([value.detach().flatten() for value in model.parameters()]), optimizer.loop.state.gauge


@pytest.mark.parametrize("deterministic", [True, False])
def test_made_anew_at_every_step_they_are_those_without_a_schedule(deterministic: bool) -> None:
    """Other decompositions of the same matrices: the steps differ by rounding alone."""
    plain = [weights.clone() for weights, _ in steps(None, deterministic=deterministic)]
    held = [weights.clone() for weights, _ in steps(Refresh(2, **NEVER), deterministic=deterministic)]
    assert not torch.allclose(plain[0], plain[-1], rtol=1e-3)
    for mine, other in zip(plain, held, strict=True):
        assert torch.allclose(mine, other, rtol=1e-7, atol=1e-9)


def test_while_a_gauge_is_held_nothing_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, eigh = [0], torch.linalg.eigh

    def counted(*arguments: Any) -> Any:
        counts[-1] += 1
        return eigh(*arguments)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    left = []
    for _, state in steps(Refresh(2, 4, **ALWAYS), count=8):
        left.append({each["left"] for each in state["held"].values()})
        counts.append(0)
    # Two pairs with two sides each: two covariances and one generator to decompose.
    assert counts[:8] == [12, 12, 0, 12, 0, 0, 0, 12]
    assert left == [{0}, {1}, {0}, {3}, {2}, {1}, {0}, {3}]


def test_running_means_go_on_while_gauges_are_held() -> None:
    for (_, held), (_, plain) in zip(steps(Refresh(2, 4, **ALWAYS), 3), steps(Refresh(2, **NEVER), 3), strict=True):
        assert held["seen"] == plain["seen"]
        for key, value in held["covariances"].items():
            assert bool(value.any())
            # The weights of the third step come from a held gauge.
            assert torch.allclose(value, plain["covariances"][key], rtol=0.5, atol=1e-3), key


def test_narrow_layers_hold_nothing() -> None:
    for _, state in steps(Refresh(7), count=2):
        assert state["held"] == {}


def test_a_step_that_is_taken_back_and_a_teleport_end_it() -> None:
    model, inputs, targets = perceptron()
    names = [name for name, _ in model.named_parameters()]
    symmetries = gauge_symmetries(mt.symmetries_of(model), linearised=True)
    point = point_of(model, inputs, targets, names)
    learned = LearnedGauge(("GL",), hidden=4).double()
    learned.refresh = Refresh(2, 8, **ALWAYS)
    assert point.loss is not None
    first, _ = Progress.begin(point.loss).judge(point.loss, deterministic=True)
    worse, _ = first.judge(2 * point.loss, deterministic=True)
    for progress, moved in (
        (first, None),
        (worse, None),
        (first, torch.tensor([True])),
        (first, torch.tensor([False])),
    ):
        state = learned.initial_state(point, symmetries)
        with torch.no_grad():
            for _ in range(2):
                _, state = learned.choose(point, symmetries, first, state, True)
            before = {key: each["element"] for key, each in state["held"].items()}
            _, state = learned.choose(point, symmetries, progress, state, True, moved)
        kept = [state["held"][key]["element"] is value for key, value in before.items()]
        ended = progress is worse or (moved is not None and bool(moved.any()))
        assert kept == [not ended] * len(before)


def point_of(model: nn.Module, inputs: Tensor, targets: Tensor, names: list[str]) -> Point:
    seen: dict[str, Tensor] = {}
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].detach()[None]})
        )
    loss = (model(inputs) - targets).square().sum() / 2
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return Point(
        {name: value.detach()[None] for name, value in model.named_parameters()},
        {name: value[None] for name, value in zip(names, gradients, strict=True)},
        seen,
        loss=loss.detach()[None],
    )


@pytest.mark.parametrize("side", ["in", "out"])
def test_what_is_held_is_the_gauge(side: Any) -> None:
    model, inputs, targets = perceptron()
    (pair, _) = gauge_symmetries(mt.symmetries_of(model), linearised=True)
    point = point_of(model, inputs, targets, [name for name, _ in model.named_parameters()])
    drawn = 0.4 * torch.randn(1, 6, 6, dtype=torch.float64)
    generator, form = drawn + drawn.mT, drawn @ drawn.mT
    curvature = form if side == "out" else None
    refresh = Refresh(2)
    held = {"a": refresh.nothing(pair, 3, torch.zeros(1, dtype=torch.float64))}
    size = pair.group.norm(generator)
    held = refresh.after(held, {}, {"a": Renewed(generator, size, curvature, torch.zeros(1, 3))})
    names = ("2.weight",) if side == "in" else ("0.weight", "0.bias")
    plain = Gauge(pair, side, names, pair.group.exp(generator), size)
    own = held_gauge(pair, side, names, held["a"], curvature)
    assert torch.allclose(own.element, plain.element)
    wanted, found = (precondition([each], point.gradients, point) for each in (plain, own))
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-9)
    if side == "in":
        assert own.above is None
        return
    assert own.above is not None
    assert torch.allclose(own.above, largest_of(plain.outgoing(form)))
    # As the curvature grows, so does the bound, before the gauge is made anew.
    grown = held_gauge(pair, side, names, held["a"], 3 * form)
    assert grown.above is not None
    assert torch.allclose(grown.above, 3 * own.above)


def test_the_change_is_that_of_the_elements() -> None:
    model, _, _ = perceptron()
    pair = gauge_symmetries(mt.symmetries_of(model), linearised=True)[0]
    unit, size, features = torch.eye(6).double()[None], torch.zeros(1).double(), torch.zeros(1, 3).double()
    for shift, length in ((0.01, 16), (0.3, 4), (0.9, 1)):
        refresh = Refresh(1, little=0.05, much=0.5)
        held = {"a": refresh.nothing(pair, 3, size)}
        # The same four times over, so that it is held for eight steps, and then one that is off by a known factor.
        for generator in (*[0 * unit] * 4, shift * unit):
            held = refresh.after(held, {}, {"a": Renewed(generator, size, None, features)})
        assert held["a"]["length"] == length


@pytest.mark.parametrize(("width", "longest"), [(128, 4), (192, 9), (256, 16), (480, 32), (4096, 32)])
def test_wider_gauges_are_held_for_longer(width: int, longest: int) -> None:
    refresh, lengths = Refresh(), [0]
    for _ in range(9):
        lengths.append(refresh.length(lengths[-1], 0.0, width))
    assert lengths[1:3] == [1, 2]
    assert lengths[-1] == longest


def test_gauges_that_cost_little_are_not_held() -> None:
    model = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 2))
    narrow, wide = gauge_symmetries(mt.symmetries_of(model), linearised=True)
    assert not Refresh().holds(narrow)
    assert Refresh().holds(wide)
