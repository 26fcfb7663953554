"""Teleporters that move along no symmetry: what they keep, what they gain, what they cost, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.objectives import Sharpness
from metateleport.point import Point
from metateleport.teleporters import LevelSetTeleporter, NullSpaceTeleporter, TrustRegion, travel
from metateleport.teleporters.free import Displacement, gradients_at
from metateleport.teleporters.null_space import null_projection


def narrow(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Fewer samples than units in every layer, so that every layer has a null space."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7), nn.LeakyReLU(0.1), nn.Linear(7, 3)).double()
    return model, torch.randn(4, 8).double(), torch.randn(4, 3).double()


def test_null_space_steps_are_seen_by_no_layer_and_raise_the_gradient() -> None:
    model, x, y = narrow()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    outputs = model(x).detach()
    report = mt.teleport(model, NullSpaceTeleporter(steps=5), x, lambda out: (out - y).square().sum())
    assert relative(model(x).detach(), outputs) < 1e-12
    assert report.gradient_norm_after > 1.05 * report.gradient_norm_before
    assert report.failures == {}
    h = x
    for name in ("0", "2", "4"):
        step = dict(model.named_parameters())[f"{name}.weight"].detach() - before[f"{name}.weight"]
        assert float((h @ step.mT).norm()) < 1e-11
        assert torch.equal(dict(model.named_parameters())[f"{name}.bias"], before[f"{name}.bias"])
        for layer in model[int(name) : int(name) + 2]:  # type: ignore[index]
            h = layer(h).detach()


@pytest.mark.parametrize("direction", ["ascent", "descent"])
def test_null_space_goes_both_ways_and_with_another_objective(direction: str) -> None:
    model, x, y = narrow()
    objective = Sharpness(radii=(0.3,), directions=3)
    teleporter = NullSpaceTeleporter(objective, steps=4, direction=direction, line_search=True)  # type: ignore[arg-type]
    report = mt.teleport(model, teleporter, x, lambda out: (out - y).square().sum())
    assert report.accepted
    assert report.gain > 0


def test_less_energy_gives_room_and_drift() -> None:
    rows = torch.diag(torch.tensor([3.0, 1.0, 1e-3, 0.0], dtype=torch.float64))
    assert torch.allclose(null_projection(rows).diagonal(), torch.tensor([0.0, 0, 0, 1], dtype=torch.float64))
    assert torch.allclose(null_projection(rows, 0.95).diagonal(), torch.tensor([0.0, 0, 1, 1], dtype=torch.float64))
    broken = torch.full((2, 3), math.nan)
    assert bool((null_projection(broken) == 0).all())


def test_without_room_the_null_space_stays_and_says_so() -> None:
    model, _, _ = narrow()
    x = torch.randn(50, 8).double()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = mt.teleport(model, NullSpaceTeleporter(), x, lambda out: out.square().sum())
    assert list(report.failures) == ["no gain"]
    assert report.size == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_level_set_reaches_the_best_point_of_an_ellipse() -> None:
    spectrum = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)

    def bowl(moved: dict[str, Tensor]) -> Tensor:
        return (moved["w"].square() * spectrum).sum() / 2

    w = torch.tensor([1.0, -1.0, 0.4], dtype=torch.float64)
    point = Point({"w": w}, {"w": spectrum * w}, loss=bowl({"w": w}), loss_at=bowl)  # type: ignore[arg-type]
    arrived, (move,), _ = travel(LevelSetTeleporter(steps=200, tolerance=1e-12), point, ())
    # On L = c the largest squared gradient is 2 c times the largest eigenvalue.
    assert float(arrived.squared_gradient_norm()) == pytest.approx(2 * float(bowl({"w": w})) * 4, rel=1e-5)
    assert float(arrived.loss) == pytest.approx(float(point.loss), rel=1e-10)  # type: ignore[arg-type]
    assert float(move.gain) > 0  # type: ignore[arg-type]


def test_the_level_set_changes_the_outputs_and_keeps_the_loss() -> None:
    model, x, y = narrow()
    outputs = model(x).detach()
    report = mt.teleport(model, LevelSetTeleporter(steps=8), x, lambda out: (out - y).square().sum())
    assert report.accepted
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-7)
    assert relative(model(x).detach(), outputs) > 1e-3
    assert report.gradient_norm_after > 1.2 * report.gradient_norm_before


def test_their_evaluations_are_counted() -> None:
    calls = []

    def counted(problem: Point) -> Point:
        loss_at = problem.loss_at
        assert loss_at is not None
        return problem.replace(loss_at=lambda moved: (calls.append(1), loss_at(moved))[1])

    point = counted(case("2022 form").problem().point())
    _, (move,), _ = travel(NullSpaceTeleporter(steps=3), point, ())
    # Each slope counts 2, and the gradients at the end one.
    assert float(move.evaluations) == 3 * 2 + 1
    assert len(calls) == 4
    calls.clear()
    _, (move,), _ = travel(LevelSetTeleporter(steps=3, line_search=False, projections=0), point, ())
    assert float(move.evaluations) == 3 * (2 + 1)
    assert len(calls) == 6


def test_what_is_refused_stays_bit_for_bit_and_is_named() -> None:
    stacked, batch = case("2022 form").stack(3)
    start = stacked.point_at(stacked.tensors(), batch)
    small = NullSpaceTeleporter(trust_region=TrustRegion(max_size=1e-9))
    arrived, (move,), _ = travel(small, start, ())
    assert move.failures == {"unstable element": "the displacement is larger than 1e-09"}
    assert bool(move.refused.all())
    assert all(torch.equal(arrived.parameters[name], value) for name, value in start.parameters.items())
    loose = LevelSetTeleporter(
        steps=2, step_size=2.0, line_search=False, projections=0, trust_region=TrustRegion(1e9, None, 1e-6)
    )
    arrived, (move,), _ = travel(loose, start, ())
    assert "the loss would change by" in move.failures["unstable element"]
    allowed = torch.tensor([True, False, True])
    arrived, (move,), _ = travel(NullSpaceTeleporter(), start, (), allowed=allowed)
    assert move.refused.tolist() == [False, True, False]
    for name, value in start.parameters.items():
        assert torch.equal(arrived.parameters[name][1], value[1])
        assert torch.equal(arrived.gradients[name][1], start.gradients[name][1])


def test_they_need_the_loss_as_a_function_and_have_no_generators() -> None:
    problem = case("linear pair").problem()
    with pytest.raises(ValueError, match="give the loss as a function"):
        travel(LevelSetTeleporter(), problem.point().replace(loss_at=None), ())
    with pytest.raises(TypeError, match="has no generators"):
        LevelSetTeleporter().generator(problem.symmetries[0], problem.point(), None)
    with pytest.raises(ValueError, match="pass loss="):
        mt.teleport(problem.model, NullSpaceTeleporter(), problem.inputs)


def test_a_displacement_goes_there_and_back() -> None:
    point = case("linear pair").problem().point()
    moving = Displacement({name: value.shape for name, value in point.gradients.items()})
    step = torch.randn(moving.group.size, dtype=torch.float64)
    there = moving.act(step, point)
    assert set(there.gradients) <= there.stale
    back = moving.act(moving.group.inverse(step), there)
    for name, value in point.parameters.items():
        assert torch.allclose(back.parameters[name], value)
    assert torch.equal(moving.flatten(moving.split(step), 0), step)


def test_gradients_elsewhere_are_those_of_a_fresh_evaluation() -> None:
    problem = case("chain of rescalings").problem()
    point = problem.point()
    moved = {name: value + 0.1 for name, value in point.parameters.items()}
    loss, gradients = gradients_at(point, moved)
    fresh = problem.point(moved)
    assert float(loss) == pytest.approx(float(fresh.loss), rel=1e-12)  # type: ignore[arg-type]
    for name, value in fresh.gradients.items():
        assert torch.allclose(gradients[name], value, rtol=1e-9)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"step_size": 0.0}, {"tolerance": -1.0}, {"backtracks": 0}, {"projections": -1}]
)
def test_bad_settings_of_the_level_set_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"step|tolerance"):
        LevelSetTeleporter(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_bad_energy_is_named(energy: float) -> None:
    with pytest.raises(ValueError, match="kept share"):
        NullSpaceTeleporter(energy=energy)
