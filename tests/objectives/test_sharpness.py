"""Sharpness against closed forms, sampling by hand and fresh evaluations."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import CASES, Case, case
from torch import Tensor

import metateleport as mt
from metateleport.objectives import Sharpness
from metateleport.point import Point

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def bowl(w: Tensor, curvature: Tensor) -> Point:
    """A point of the quadratic `1/2 w^T C w`."""
    return Point({"w": w}, loss_at=lambda moved: moved["w"] @ curvature @ moved["w"] / 2)


def test_it_is_the_mean_rise_of_a_quadratic_in_all_directions() -> None:
    # The mean of d^T C d over the sphere is tr C / n, and d itself averages out.
    curvature = torch.diag(torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
    w = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    found = Sharpness(radii=(0.5, 2.0), directions=20000, at_once=10000)(bowl(w, curvature))
    expected = float(w @ curvature @ w) / 2 + (0.25 + 4) / 2 * 12 / 3 / 2
    assert float(found) == pytest.approx(expected, rel=0.02)


def test_every_direction_is_a_unit_vector_of_all_parameters_together() -> None:
    seen = []

    def loss_at(moved: dict[str, Tensor]) -> Tensor:
        seen.append(math.hypot(float(moved["a"].norm()), float(moved["b"].norm())))
        return moved["a"].sum()

    point = Point({"a": torch.zeros(3, 2).double(), "b": torch.zeros(5).double()}, loss_at=loss_at)
    Sharpness(radii=(0.1, 3.0), directions=4)(point)
    assert seen == pytest.approx([0.1, 3.0] * 4)


def test_directions_are_spread_evenly_and_come_from_their_seed() -> None:
    places = []

    def loss_at(moved: dict[str, Tensor]) -> Tensor:
        places.append(moved["w"])
        return moved["w"].sum()

    point = Point({"w": torch.zeros(4).double()}, loss_at=loss_at)
    values = [float(Sharpness(radii=(1.0,), directions=2000, seed=seed)(point)) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    mean = torch.stack(places[:2000]).mean(0)
    assert float(mean.norm()) < 0.06
    assert float((torch.stack(places[:2000]).T @ torch.stack(places[:2000]) / 2000 - torch.eye(4) / 4).norm()) < 0.05


@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_copies_evaluated_together_give_the_same(at_once: int) -> None:
    problem = case("2022 form").problem()
    one = Sharpness(radii=(0.1, 0.3), directions=5)(problem.point())
    together = Sharpness(radii=(0.1, 0.3), directions=5, at_once=at_once)(problem.point())
    assert float(together) == pytest.approx(float(one), rel=1e-12)


@every_case
def test_it_is_one_number_for_each_stacked_task(case: Case) -> None:
    stacked, batch = case.stack(3)
    objective = Sharpness(radii=(0.1,), directions=3, at_once=2)
    found = objective(stacked.point_at(stacked.tensors(), batch))
    expected = [float(objective(case.problem(seed).point())) for seed in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


@every_case
def test_its_slope_along_the_orbit_is_that_of_differences(case: Case) -> None:
    problem, objective = case.problem(), Sharpness(radii=(0.1, 0.2), directions=2)
    start = problem.point()
    for symmetry in problem.symmetries:
        direction = symmetry.group.random_generator(size=1.0, seed=0, dtype=torch.float64)

        def along(t: Tensor, symmetry: mt.Symmetry = symmetry, direction: Tensor = direction) -> Tensor:
            return objective(symmetry.act(symmetry.group.exp(t * direction), start))

        t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(along(t), t)
        # The loss has kinks, which a longer difference would step over.
        difference = (along(t.detach() + 1e-6) - along(t.detach() - 1e-6)) / 2e-6
        assert float(slope) == pytest.approx(float(difference.detach()), rel=1e-4, abs=1e-6)


def test_buffers_that_a_symmetry_moves_are_not_perturbed() -> None:
    problem = case("batch norm, evaluation").problem()
    point = problem.point()
    buffers = {name for symmetry in problem.symmetries for name in symmetry.buffers}
    assert buffers

    def loss_at(moved: dict[str, Tensor]) -> Tensor:
        assert all(torch.equal(moved[name], point.parameters[name]) for name in buffers)
        return moved["0.weight"].sum()

    Sharpness(directions=2)(point.replace(loss_at=loss_at))


def test_its_price_and_what_it_refuses() -> None:
    problem = case("linear pair").problem()
    objective = Sharpness(radii=(0.1, 0.2, 0.3), directions=4)
    assert objective.evaluations(problem.symmetries[0], problem.point()) == 12
    with pytest.raises(ValueError, match="evaluate the point with a loss"):
        objective(Point({"w": torch.zeros(2)}))
    for wrong in ({"radii": ()}, {"radii": (0.0,)}, {"radii": (0.1, math.inf)}, {"directions": 0}, {"at_once": 0}):
        with pytest.raises(ValueError, match=r"radii|at least one"):
            Sharpness(**wrong)  # type: ignore[arg-type]
