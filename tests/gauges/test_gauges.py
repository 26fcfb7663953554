"""Gauges: tensors stepped somewhere on the orbit, and the whitening element that makes it pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_cases import CASES, Case, assert_close, case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.gauges import TensorGroup, gauge_symmetries, step_in_gauges, tensor_groups, undo
from metateleport.point import Point
from metateleport.teleporters import travel

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def descend(rate: float) -> Any:
    def step(point: Point, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: point.parameters[name] - rate * point.gradients[name] for name in names}

    return step


def random_gauges(group: TensorGroup) -> mt.Teleporter:
    return mt.RandomTeleporter(0.5, seed=len(group.names[0]))


@every_case
def test_every_tensor_is_in_one_group(case: Case) -> None:
    problem = case.problem()
    names = [name for name, _ in problem.model.named_parameters()]
    groups = tensor_groups(names, problem.symmetries)
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    for group in groups:
        for name in group.names:
            assert list(group.symmetries) == [each for each in problem.symmetries if name in each.parameters]
        for symmetry in group.symmetries:
            sides = {symmetry.side(name) for name in group.names}
            assert len(sides) == 1
            assert sides != {"both"} or len(group.names) == 1


@every_case
def test_a_step_of_zero_in_any_gauge_leaves_the_model(case: Case) -> None:
    problem = case.problem()
    point = problem.point()
    stepped = step_in_gauges(point, problem.symmetries, random_gauges, descend(0.0))
    if case.group_law:
        assert_close(stepped.parameters, point.parameters, 1e-9)
    assert relative(problem.outputs(stepped.parameters), problem.outputs()) <= 1e-9


@every_case
def test_without_an_element_it_is_the_step_itself(case: Case) -> None:
    point = case.problem().point()
    stepped = step_in_gauges(point, case.problem().symmetries, lambda _: mt.NoTeleport(), descend(0.1))
    expected = {**point.parameters, **descend(0.1)(point, tuple(point.gradients))}
    assert_close(stepped.parameters, expected, 1e-14)
    assert float(stepped.evaluations) == 0


@every_case
def test_the_stepped_tensors_gradient_in_the_gauge_is_the_one_there(case: Case) -> None:
    problem = case.problem()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(point: Point, names: tuple[str, ...]) -> dict[str, Tensor]:
        fresh = problem.point(point.parameters)
        assert not point.stale & set(names)
        seen.update({name: (point.gradients[name], fresh.gradients[name]) for name in names})
        return {name: point.parameters[name] for name in names}

    step_in_gauges(problem.point(), problem.symmetries, random_gauges, look)
    assert set(seen) == {name for name, _ in problem.model.named_parameters()}
    # On the scale of the largest: a key bias has no gradient.
    assert_close(*({name: pair[side] for name, pair in seen.items()} for side in (0, 1)), 1e-8)


@every_case
def test_undoing_a_travel_leads_back(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    arrived, moves, _ = travel(mt.RandomTeleporter(0.5, seed=0), start, problem.symmetries)
    home, cost = undo(moves, arrived)
    if case.group_law:
        assert_close(home.parameters, start.parameters, 1e-9)
    assert relative(problem.outputs(home.parameters), problem.outputs()) <= 1e-8
    assert float(cost) == 0


def test_gradient_descent_in_whitening_gauges_is_scaled_gradient_descent() -> None:
    problem = case("linear pair without bias").problem()
    point, (pair,) = problem.point(), problem.symmetries
    inputs = problem.inputs[0]
    stepped = step_in_gauges(point, [pair], mt.WhiteningTeleporter.for_group, descend(0.3))
    v, u = point.parameters["0.weight"], point.parameters["1.weight"]
    # Four units on three inputs: the features span three directions, in which U's step is the normal equations'.
    features = inputs @ v.mT
    step_u = point.gradients["1.weight"] @ torch.linalg.pinv(features.mT @ features, rcond=1e-10, hermitian=True)
    assert relative((stepped.parameters["1.weight"] - u) @ features.mT, -0.3 * step_u @ features.mT) <= 1e-6
    step_v = torch.linalg.pinv(u.mT @ u, rcond=1e-10, hermitian=True) @ point.gradients["0.weight"]
    assert relative(u @ (stepped.parameters["0.weight"] - v), -0.3 * u @ step_v) <= 1e-6
    assert float(stepped.evaluations) == 0


def test_the_factors_of_an_adapter_take_scaled_steps() -> None:
    problem = case("low-rank adapter").problem()
    point, (pair,) = problem.point(), problem.symmetries
    stepped = step_in_gauges(point, [pair], mt.WhiteningTeleporter.for_group, descend(0.3))
    lower, upper = (name for name in pair.parameters)
    assert (pair.side(lower), pair.side(upper)) == ("out", "in")
    a, b = point.parameters[lower], point.parameters[upper]
    assert relative(stepped.parameters[lower] - a, -0.3 * torch.linalg.solve(b.mT @ b, point.gradients[lower])) <= 1e-6


def test_a_gauge_costs_what_it_rebuilds() -> None:
    problem = case("2022 form, samples at width").problem()
    point, (pair,) = problem.point(), problem.symmetries
    # Layers of 25 and 15 products a sample: V's gauge has U send its cotangent down and V's gradient made anew, and
    # runs V's layer once more to undo it. U's gauge needs nothing of this.
    everything = step_in_gauges(point, [pair], random_gauges, descend(0.1)).evaluations
    assert float(everything) == pytest.approx((15 + 25 + 25) / (3 * 40))
    upper = step_in_gauges(
        point,
        [pair],
        lambda group: random_gauges(group) if "2.weight" in group.names else mt.NoTeleport(),
        descend(0.1),
    )
    assert float(upper.evaluations) == 0
    lower = upper.moves["0.weight",]
    assert float(lower[0].size) == 0


def test_tasks_that_may_not_move_are_stepped_as_they_are() -> None:
    stacked, batch = case("2022 form").stack(3)
    start = stacked.point_at(stacked.tensors(), batch)
    allowed = torch.tensor([True, False, True])
    stepped = step_in_gauges(start, stacked.symmetries, random_gauges, descend(0.1), allowed=allowed)
    plain = {name: value - 0.1 * start.gradients[name] for name, value in start.parameters.items()}
    for name, value in stepped.parameters.items():
        assert torch.allclose(value[1], plain[name][1], rtol=0, atol=0)
        assert name == "2.bias" or not torch.allclose(value[0], plain[name][0])
    assert stepped.evaluations[1] == 0


def test_of_two_symmetries_of_one_pair_of_layers_the_first_is_stepped_in() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    linear, rescaling = mt.LinearPair(model, "0", "1"), mt.Rescaling(model, "0", "1")
    for both in ([linear, rescaling], [rescaling, linear]):
        for linearised in (True, False):
            (chosen,) = gauge_symmetries(both, linearised)
            assert chosen is both[0] or (linearised and both[0] is rescaling)


def test_a_point_without_gradients_is_refused() -> None:
    problem = case("linear pair").problem()
    with pytest.raises(ValueError, match="needs gradients"):
        step_in_gauges(problem.point().replace(gradients={}), problem.symmetries, random_gauges, descend(0.1))
