"""Curvature of orbits against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import CASES, Case, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.objectives import Curvature
from metateleport.objectives.curvature import curve_derivatives
from metateleport.point import Point
from metateleport.symmetries import QuadraticRotation

every_case = pytest.mark.parametrize("case", CASES, ids=str)

# Of problems where no activation has its kink within the reach of the differences.
SEED = 2


def scalar_chain(u: float, v: float) -> tuple[nn.Module, Point]:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.LeakyReLU(0.1), nn.Linear(1, 1, bias=False)).double()
    weights = {
        "0.weight": torch.tensor([[v]], dtype=torch.float64),
        "2.weight": torch.tensor([[u]], dtype=torch.float64),
    }
    return model, Point(weights)


@pytest.mark.parametrize(("u", "v"), [(1.0, 1.0), (3.0, 0.5), (-0.2, 4.0)])
def test_two_scalar_layers_move_on_a_hyperbola(u: float, v: float) -> None:
    # On (u e^-t, v e^t) the wedge of the derivatives (-u, v) and (u, v) is 2 |u v|.
    model, point = scalar_chain(u, v)
    found = Curvature([mt.Rescaling(model, "0", "2")], curves=3)(point)
    assert float(found) == pytest.approx(2 * abs(u * v) / math.hypot(u, v) ** 3, rel=1e-12)


@pytest.mark.parametrize("radius", [0.1, 1.0, 7.0])
def test_on_a_circle_it_is_one_over_the_radius(radius: float) -> None:
    model = nn.Module()
    model.x = nn.Parameter(radius * torch.tensor([0.6, 0.8], dtype=torch.float64))
    point = Point({"x": model.x.detach()}, activations={"": torch.eye(2, dtype=torch.float64)})
    assert float(Curvature([QuadraticRotation(model)])(point)) == pytest.approx(1 / radius, rel=1e-9)


def test_on_an_ellipse_it_is_that_of_the_textbook() -> None:
    model = nn.Module()
    a, b, t = 3.0, 0.5, 0.7
    model.x = nn.Parameter(torch.tensor([a * math.cos(t), b * math.sin(t)], dtype=torch.float64))
    matrix = torch.diag(torch.tensor([a**-2, b**-2], dtype=torch.float64))
    found = Curvature([QuadraticRotation(model)])(Point({"x": model.x.detach()}, activations={"": matrix}))
    expected = a * b / ((a * math.sin(t)) ** 2 + (b * math.cos(t)) ** 2) ** 1.5
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_linear_pairs_have_the_derivatives_of_the_exponential() -> None:
    problem = case("linear pair").problem()
    point, (pair,) = problem.point(), problem.symmetries
    m = pair.group.random_generator(seed=0, dtype=torch.float64)
    first, second = curve_derivatives([pair], [m], point)
    v, b, u = (point.parameters[name] for name in ("0.weight", "0.bias", "1.weight"))
    for found, expected in (
        (first, {"0.weight": m @ v, "0.bias": m @ b, "1.weight": -u @ m}),
        (second, {"0.weight": m @ m @ v, "0.bias": m @ m @ b, "1.weight": u @ m @ m}),
    ):
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12)


def by_differences(case: Case, step: float = 1e-3) -> tuple[Tensor, Tensor, float]:
    problem = case.problem(SEED)
    point, symmetries = problem.point(), problem.symmetries
    source = torch.Generator().manual_seed(0)
    generators = [each.group.random_generator(generator=source, dtype=torch.float64) for each in symmetries]

    def at(t: float) -> Tensor:
        here = point.replace(gradients={}, cotangents={}, pullback=None)
        for symmetry, generator in zip(reversed(symmetries), reversed(generators), strict=True):
            here = symmetry.act(symmetry.group.exp(t * generator), here)
        names = dict.fromkeys(name for each in symmetries for name in (*each.parameters, *each.buffers))
        return torch.cat([here.parameters[name].flatten() for name in names])

    # Of fourth order, so that what is left is far below the tolerance.
    near, far = (at(step), at(-step)), (at(2 * step), at(-2 * step))
    first = (8 * (near[0] - near[1]) - (far[0] - far[1])) / (12 * step)
    second = (16 * (near[0] + near[1]) - (far[0] + far[1]) - 30 * at(0.0)) / (12 * step**2)
    kappa = math.sqrt(float(first @ first) * float(second @ second) - float(first @ second) ** 2)
    return first, second, kappa / float(first.norm()) ** 3


@every_case
def test_derivatives_and_curvature_are_those_of_differences(case: Case) -> None:
    first, second, kappa = by_differences(case)
    problem = case.problem(SEED)
    source = torch.Generator().manual_seed(0)
    generators = [each.group.random_generator(generator=source, dtype=torch.float64) for each in problem.symmetries]
    found = curve_derivatives(problem.symmetries, generators, problem.point())
    for mine, expected in zip(found, (first, second), strict=True):
        flat = torch.cat([value.flatten() for value in mine.values()])
        assert float((flat - expected).norm()) <= 1e-6 * float(first.norm() + second.norm())
    objective = Curvature(problem.symmetries, curves=1, seed=0)
    assert float(objective(problem.point())) == pytest.approx(kappa, rel=1e-5, abs=1e-6)


@every_case
def test_it_is_one_number_for_each_stacked_task(case: Case) -> None:
    stacked, batch = case.stack(3)
    objective = Curvature(stacked.symmetries, curves=2)
    found = objective(stacked.point_at(stacked.tensors(), batch))
    expected = [float(objective(case.problem(seed).point())) for seed in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-8)


@every_case
def test_its_slope_along_the_orbit_is_that_of_differences(case: Case) -> None:
    problem = case.problem()
    objective, start = Curvature(problem.symmetries, curves=2), problem.point()
    for symmetry in problem.symmetries:
        direction = symmetry.group.random_generator(size=1.0, seed=7, dtype=torch.float64)

        def along(t: Tensor, symmetry: mt.Symmetry = symmetry, direction: Tensor = direction) -> Tensor:
            return objective(symmetry.act(symmetry.group.exp(t * direction), start))

        t = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        value = along(t)
        slope = torch.autograd.grad(value, t)[0] if value.requires_grad else torch.zeros(())
        difference = (along(t.detach() + 1e-6) - along(t.detach() - 1e-6)) / 2e-6
        assert float(slope) == pytest.approx(float(difference.detach()), rel=1e-4, abs=1e-5)


def test_a_straight_curve_and_one_that_stands_still_have_none() -> None:
    problem = case("translations").problem()
    (first, *_) = problem.symmetries
    assert float(Curvature([first])(problem.point())) == pytest.approx(0, abs=1e-12)
    model, point = scalar_chain(0.0, 0.0)
    assert float(Curvature([mt.Rescaling(model, "0", "2")])(point)) == 0


def test_its_price_and_what_it_refuses() -> None:
    exact, batch = case("linear pair").problem(), case("2022 form").problem()
    assert Curvature(exact.symmetries).evaluations(exact.symmetries[0], exact.point()) == 0
    share = batch.symmetries[0].undo_cost(batch.point(), batch.symmetries[0].parameters)
    objective = Curvature(batch.symmetries, curves=5)
    assert objective.evaluations(batch.symmetries[0], batch.point()) == pytest.approx(60 * share)
    assert share > 0
    with pytest.raises(ValueError, match="there is none"):
        Curvature([])
    with pytest.raises(ValueError, match="at least one curve"):
        Curvature(exact.symmetries, curves=0)
