"""Batch pairs: the conditions that they hold under, and what rebuilding the backward pass costs."""

from __future__ import annotations

import pytest
import torch
from action_cases import TASKS, elements, moved
from symmetry_cases import CASES, Case, case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.point import Point
from metateleport.symmetries import (
    BatchPair2022,
    BatchPair2024,
)

BATCH = [each for each in CASES if not each.exact]


@pytest.mark.parametrize("case", BATCH, ids=str)
def test_batch_pairs_do_not_hold_elsewhere(case: Case) -> None:
    problem, inputs = case.problem(), case.fresh_inputs()
    arrived = moved(case, problem.point())
    assert relative(problem.outputs(arrived.parameters, inputs), problem.outputs(inputs=inputs)) > 1e-3


def test_the_2024_form_has_no_group_law_below_its_width() -> None:
    problem = case("2024 form").problem()
    (symmetry,), start = problem.symmetries, problem.point()
    element = elements(symmetry)
    back = symmetry.act(symmetry.group.inverse(element), symmetry.act(element, start))
    assert relative(back.parameters["2.weight"], start.parameters["2.weight"]) > 1e-3
    assert relative(problem.outputs(back.parameters), problem.outputs()) <= 1e-9


@pytest.mark.parametrize("case", BATCH, ids=str)
def test_gradients_below_a_batch_pair_are_differentiable_in_the_element(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    symmetry = problem.symmetries[-1]
    generator = symmetry.group.random_generator(size=0.5, seed=3, dtype=torch.float64).requires_grad_()

    def gradients(t: Tensor) -> tuple[Tensor, ...]:
        return tuple(symmetry.act(symmetry.group.exp(t), start).gradients.values())

    assert torch.autograd.gradcheck(gradients, generator, fast_mode=True)


@pytest.mark.parametrize("case", BATCH, ids=str)
def test_without_a_backward_pass_to_rebuild_gradients_are_stale(case: Case) -> None:
    problem = case.problem()
    full = problem.point()
    symmetry = problem.symmetries[-1]
    element = elements(symmetry)
    no_graph = symmetry.act(element, full.replace(pullback=None))
    below = {name for name in full.gradients if name not in symmetry.parameters and name != f"{symmetry.second}.bias"}
    assert no_graph.stale >= below
    assert not no_graph.stale & set(symmetry.parameters)
    nothing = symmetry.act(element, full.replace(cotangents={}))
    assert nothing.stale == set(full.gradients)


@pytest.mark.parametrize("power", [0.5, 0.7, 0.74, 0.76, 0.8, 0.95])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_is_full_as_long_as_a_quarter_of_the_digits_is_left(power: float, dtype: torch.dtype) -> None:
    """In the ratio of the singular values, near the limit too, where a bound on it would not tell."""
    rows, eps = 4, torch.finfo(dtype).eps
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for size in (rows, 6))
    inputs = (left * torch.logspace(0, 1, rows, base=eps**power, dtype=torch.float64)) @ right[:rows]
    problem = case("2022 form").problem()
    (symmetry,) = problem.symmetries
    point = Point(problem.point().parameters, activations={"0": inputs.to(dtype)})
    assert bool(symmetry.holds(point)) is (power < 0.75)


def test_conditions_of_the_batch_pairs() -> None:
    for name, width in (("2022 form", 6), ("2024 form", 7)):
        build = case(name)
        problem = build.problem()
        (symmetry,) = problem.symmetries

        def holds(inputs: Tensor, problem=problem, symmetry=symmetry) -> bool:  # type: ignore[no-untyped-def]
            point = Point(problem.point().parameters, activations={"0": inputs})
            element = elements(symmetry)
            assert bool(symmetry.holds(point)) == bool(symmetry.holds(point, element))
            return bool(symmetry.holds(point))

        features = build.shape[1]
        assert holds(problem.inputs[0])
        many = torch.randn(width + 1, features, dtype=torch.float64)
        assert not holds(many)
        twice = problem.inputs[0].clone()
        twice[1] = twice[0]
        assert not holds(twice)
        lost = problem.inputs[0].clone()
        lost[0, 0] = float("nan")
        assert not holds(lost)


def test_the_2024_condition_looks_at_the_moved_features() -> None:
    # ReLU kills every unit once g turns the sign of all pre-activations.
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[0, 1] = 2.0
    symmetry = BatchPair2024(model, "0", "2", model[1])
    point = Point(dict(model.named_parameters()), activations={"0": torch.ones(1, 2, dtype=torch.float64)})
    assert symmetry.holds(point)
    assert not symmetry.holds(point, -torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(("name", "factor"), [("2022 form", 1.0), ("2022 form", 0.0), ("2024 form", 1.0)])
def test_a_task_with_dependent_samples_spoils_no_other(name: str, factor: float) -> None:
    build = case(name)
    stacked, (inputs, targets) = build.stack(TASKS)
    inputs[0][1, 1] = factor * inputs[0][1, 0]
    point = stacked.point_at(stacked.tensors(), (inputs, targets))
    (symmetry,) = stacked.symmetries
    assert symmetry.holds(point).tolist() == [True, False, True]
    generator = symmetry.group.random_generator(TASKS, seed=0, dtype=torch.float64).requires_grad_()
    arrived = symmetry.act(symmetry.group.exp(generator), point)
    assert all(bool(value.isfinite().all()) for value in arrived.parameters.values())
    total = sum(value[0].sum() + value[2].sum() for value in arrived.parameters.values())
    (slope_of_generator,) = torch.autograd.grad(total, generator)
    assert bool(slope_of_generator.isfinite().all())
    assert not slope_of_generator[1].any()


def test_rebuilding_costs_a_third_at_depth_two() -> None:
    for name in ("2022 form, samples at width", "2024 form", "2022 form"):
        problem = case(name).problem()
        assert problem.symmetries[0].rebuild_cost(problem.point()) == pytest.approx(1 / 3)


def test_rebuilding_costs_its_products_at_depth_three() -> None:
    problem = case("chain of 2022 forms").problem()
    lower, upper = problem.symmetries
    sizes = [5 * 6, 6 * 4, 4 * 3]
    # U's way down, V's gradient and way down, the lowest layer's gradient.
    assert upper.rebuild_cost(problem.point()) == pytest.approx((sizes[2] + 2 * sizes[1] + sizes[0]) / (3 * sum(sizes)))
    assert lower.rebuild_cost(problem.point()) == pytest.approx((sizes[1] + sizes[0]) / (3 * sum(sizes)))
    stacked, batch = case("chain of 2022 forms").stack(TASKS)
    assert upper.rebuild_cost(stacked.point_at(stacked.tensors(), batch)) == upper.rebuild_cost(problem.point())


@pytest.mark.parametrize("kind", [BatchPair2022, BatchPair2024])
def test_activations_in_place_are_taken_out_of_place(kind: type) -> None:
    def chain(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        between = [nn.LeakyReLU(0.1, inplace=inplace) for _ in range(2)]
        return nn.Sequential(nn.Linear(5, 5), between[0], nn.Linear(5, 5), between[1], nn.Linear(5, 2)).double()

    inputs = torch.randn(4, 5, dtype=torch.float64)
    reports = []
    for inplace in (False, True):
        model = chain(inplace)
        symmetries = [kind(model, "0", "2", model[1]), kind(model, "2", "4", model[3])]
        teleporter = mt.GradientAscentTeleporter(steps=2)
        reports.append(mt.teleport(model, teleporter, inputs, lambda outputs: outputs.square().sum(), symmetries))
        assert model[1].inplace == inplace
    assert reports[1].accepted
    assert reports[0].gradient_norm_after == pytest.approx(reports[1].gradient_norm_after, rel=1e-12)
