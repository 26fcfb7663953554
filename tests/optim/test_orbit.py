"""The bound on how far all teleports together may lead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.groups import GeneralLinear, Orthogonal, PositiveDiagonal
from metateleport.optim import TeleportingOptimizer
from metateleport.point import Point
from metateleport.symmetries.rotary import PlaneScaling
from metateleport.symmetries.translation import Translation
from metateleport.teleporters.reach import shortened, stretch

GROUPS = [PositiveDiagonal(4), GeneralLinear(4), Orthogonal(4), PlaneScaling(4), Translation(4)]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: type(group).__name__)
@pytest.mark.parametrize("seed", range(5))
def test_a_shortened_element_ends_within_the_bound_and_in_the_group(group: Any, seed: int) -> None:
    bound = math.log(2.0)
    reached = group.random(size=0.5, seed=seed, dtype=torch.float64)
    element = group.random(size=8.0, seed=seed + 100, dtype=torch.float64)
    short = shortened(group, element, reached, bound)
    after = float(stretch(group, group.compose(short, reached)))
    assert after <= max(bound, float(stretch(group, reached))) + 1e-9
    # Applied again it is the same, and what is within is left alone.
    assert shortened(group, short, reached, bound + 1e-9) is short
    small = group.random(size=1e-3, seed=seed, dtype=torch.float64)
    assert shortened(group, small, group.identity(dtype=torch.float64), bound) is small
    if isinstance(group, PlaneScaling):
        other = group.random(size=1.0, seed=seed + 7, dtype=torch.float64)
        assert torch.allclose(short @ other, other @ short, atol=1e-9)


def mlp(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    between = nn.ReLU if kind == "diagonal" else nn.Identity
    return nn.Sequential(nn.Linear(4, 6), between(), nn.Linear(6, 6), between(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("seed", range(5))
def test_a_matrix_that_leads_out_from_the_bound_is_not_cut_off_again(seed: int) -> None:
    group, bound = GeneralLinear(4), math.log(2.0)
    reached = torch.diag(torch.tensor([2.0, 1.0, 0.5, 1.0], dtype=torch.float64))
    generator = torch.zeros(4, 4, dtype=torch.float64)
    generator[0, 0] = 0.3
    generator += 1e-2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(shortened(group, group.exp(generator), reached, bound), group.identity(dtype=torch.float64))
    back = torch.diag(torch.tensor([0.7, 1.0, 1.1, 1.0], dtype=torch.float64))
    assert shortened(group, back, reached, bound) is back


class Pushing(mt.Teleporter):
    """The same way, again and again."""

    name = "pushing"

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        return symmetry.group.random_generator(size=0.5, seed=3, dtype=torch.float64), state


def run(optimizer: TeleportingOptimizer, steps: int) -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["diagonal", "GL"])
@pytest.mark.parametrize("max_stretch", [3.0, None])
@pytest.mark.filterwarnings("ignore:all teleports")
def test_the_same_way_again_and_again_ends_at_the_bound(kind: str, max_stretch: float | None) -> None:
    model = mlp(kind)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = TeleportingOptimizer(inner, model, Pushing(), every=1, max_stretch=max_stretch)
    run(optimizer, 30)
    factors = [
        float(model.get_parameter(name).norm() / value.norm()) for name, value in before.items() if value.ndim == 2
    ]
    largest = max(max(factor, 1 / factor) for factor in factors)
    stretches = [report.stretch for report in optimizer.reports]
    if max_stretch is None:
        assert stretches[-1] > 10
        assert largest > 10
        return
    assert max(stretches) <= 3 * (1 + 1e-6)
    assert largest <= 3 * (1 + 1e-6)
    assert stretches[-1] > 2
    assert stretches == sorted(stretches)
    assert all(report.size > 0 or "max_stretch" in report.reason for report in optimizer.reports)
    assert sum(report.size > 0 for report in optimizer.reports) >= 2
    assert all(report.drift < 1e-10 for report in optimizer.reports)


def test_the_bound_is_told_once_saved_and_never_reset() -> None:
    model = mlp("diagonal")
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = TeleportingOptimizer(inner, model, Pushing(), every=1, max_stretch=2.0)
    with pytest.warns(UserWarning, match="max_stretch=2") as caught:
        run(optimizer, 10)
    assert len(caught) == 1
    saved = optimizer.state_dict()
    resumed = TeleportingOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, Pushing(), max_stretch=2.0)
    resumed.load_state_dict(saved)
    assert resumed._orbit.stretch(resumed.symmetries) == pytest.approx(optimizer.last_report.stretch)  # type: ignore[union-attr]
    bare = inner.state_dict()
    resumed.load_state_dict(bare)
    assert resumed._orbit.stretch(resumed.symmetries) > 1.5


@pytest.mark.parametrize("bad", [1.0, 0.5, float("inf"), float("nan")])
def test_a_bound_that_is_none_is_named(bad: float) -> None:
    model = mlp("diagonal")
    with pytest.raises(ValueError, match="max_stretch is a factor above one"):
        TeleportingOptimizer(torch.optim.SGD(model.parameters()), model, Pushing(), max_stretch=bad)


@pytest.mark.parametrize("name", ["leaky_mlp", "matrix_factorisation", "leaky_mlp_stays"])
@pytest.mark.filterwarnings("ignore:all teleports")
def test_a_gauge_taken_as_a_teleport_again_and_again_does_not_run_away(name: str) -> None:
    model = mlp("GL")
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = TeleportingOptimizer(inner, model, mt.load(name), every=1)
    run(optimizer, 40)
    assert max(report.stretch for report in optimizer.reports) <= 10 * (1 + 1e-5)
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    assert sum(report.size > 0 for report in optimizer.reports) >= 1


def test_the_report_tells_the_stretch_of_all_elements_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = TeleportingOptimizer(inner, model, Pushing(), every=1, max_stretch=1e6)
    run(optimizer, 6)
    generator = PositiveDiagonal(6).random_generator(size=0.5, seed=3, dtype=torch.float64)
    expected = [math.exp((step + 1) * float(generator.abs().max())) for step in range(6)]
    assert [report.stretch for report in optimizer.reports] == pytest.approx(expected)
    # A bound that one unit is at holds up that unit alone, and the next bound is seen from a saved state too.
    saved = optimizer.state_dict()
    short = TeleportingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, Pushing(), every=1, max_stretch=2.0
    )
    short.load_state_dict(saved)
    with pytest.warns(UserWarning, match="max_stretch=2"):
        run(short, 1)
    assert short.last_report is not None
    assert short.last_report.stretch == pytest.approx(expected[-1])


def test_two_symmetries_that_meet_in_a_layer_are_bounded_each_and_together() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(self.norm(x))))

    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(20, 4, dtype=torch.float64)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = TeleportingOptimizer(inner, model, Pushing(), every=1, max_stretch=3.0, example_input=x)
    assert len(optimizer.symmetries) >= 2
    assert len({symmetry.key for symmetry in optimizer.symmetries}) == len(optimizer.symmetries)
    norm = model.a.weight.norm().item()
    with pytest.warns(UserWarning, match="max_stretch=3"):
        run(optimizer, 20)
    assert 1 / 3.001 < model.a.weight.norm().item() / norm < 3.001
    assert max(report.stretch for report in optimizer.reports) < 3.001
    assert all(len(report.sizes) == len(optimizer.symmetries) for report in optimizer.reports)
