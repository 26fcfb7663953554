"""Objectives against autograd, and their price."""

from __future__ import annotations

import pytest
import torch
from symmetry_cases import CASES, Case, case

import metateleport as mt
from metateleport.objectives import SquaredGradientNorm
from metateleport.point import Point

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_squared_gradient_norm_is_that_of_autograd(case: Case) -> None:
    problem = case.problem()
    problem.loss_of(problem.model(*problem.inputs)).backward()
    expected = sum(float(parameter.grad.square().sum()) for parameter in problem.model.parameters())
    assert float(SquaredGradientNorm()(problem.point())) == pytest.approx(expected, rel=1e-12)


@every_case
def test_it_is_one_number_for_each_stacked_task(case: Case) -> None:
    stacked, batch = case.stack(3)
    found = SquaredGradientNorm()(stacked.point_at(stacked.tensors(), batch))
    expected = [float(SquaredGradientNorm()(case.problem(seed).point())) for seed in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@every_case
def test_its_slope_along_the_orbit_is_that_of_fresh_evaluations(case: Case) -> None:
    problem, objective = case.problem(), SquaredGradientNorm()
    start = problem.point()
    for symmetry in problem.symmetries:
        direction = symmetry.group.random_generator(size=1.0, seed=0, dtype=torch.float64)

        def fresh(t: float, symmetry: mt.Symmetry = symmetry, direction: torch.Tensor = direction) -> float:
            arrived = symmetry.act(symmetry.group.exp(t * direction), start)
            return float(objective(problem.point(arrived.parameters)))

        t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        value = objective(symmetry.act(symmetry.group.exp(t * direction), start))
        (slope,) = torch.autograd.grad(value, t)
        assert float(value.detach()) == pytest.approx(fresh(0.1), rel=1e-8)
        assert float(slope) == pytest.approx((fresh(0.1 + 1e-5) - fresh(0.1 - 1e-5)) / 2e-5, rel=1e-4)


def test_prices() -> None:
    exact, batch = case("linear pair").problem(), case("2022 form").problem()
    objective = SquaredGradientNorm()
    assert objective.evaluations(exact.symmetries[0], exact.point()) == 0
    assert objective.evaluations(batch.symmetries[0], batch.point()) == pytest.approx(1.0)


def test_stale_gradients_are_left_out_and_missing_ones_refused() -> None:
    point = Point(
        {"a": torch.zeros(2), "b": torch.zeros(1)},
        gradients={"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])},
        stale=frozenset({"b"}),
    )
    assert float(SquaredGradientNorm()(point)) == 25
    with pytest.raises(ValueError, match="evaluate the point with a loss"):
        SquaredGradientNorm()(Point({"a": torch.zeros(2)}))
