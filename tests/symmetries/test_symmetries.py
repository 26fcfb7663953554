"""Every symmetry as an action: invariance, group laws, and what is carried along."""

from __future__ import annotations

import copy

import pytest
import torch
from action_cases import TASKS, elements, moved
from symmetry_cases import CASES, Case, assert_close, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.point import Point
from metateleport.symmetries import (
    Pair,
)

EXACT = [each for each in CASES if each.exact]


every_case = pytest.mark.parametrize("case", CASES, ids=str)
exact_case = pytest.mark.parametrize("case", EXACT, ids=str)


@every_case
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outputs_do_not_change(case: Case, seed: int) -> None:
    problem = case.problem(seed)
    arrived = moved(case, problem.point(), seed=seed)
    for name in {problem.symmetries[0].parameters[0], problem.symmetries[-1].parameters[-1]}:
        assert relative(arrived.parameters[name], problem.point().parameters[name]) > 1e-2
    assert relative(problem.outputs(arrived.parameters), problem.outputs()) <= 1e-9


@exact_case
def test_exact_symmetries_hold_on_inputs_never_seen(case: Case) -> None:
    if case.name == "quadratic":
        pytest.skip("its input is the problem itself")
    problem, inputs = case.problem(), case.fresh_inputs()
    arrived = moved(case, problem.point())
    assert relative(problem.outputs(arrived.parameters, inputs), problem.outputs(inputs=inputs)) <= 1e-9


@every_case
def test_identity_leaves_the_point_alone(case: Case) -> None:
    problem = case.problem()
    point = problem.point()
    for symmetry in problem.symmetries:
        same = symmetry.act(symmetry.group.identity(dtype=torch.float64), point)
        assert_close(same.parameters, point.parameters, 1e-13)
        assert_close(same.gradients, point.gradients, 1e-12)
        assert same.parameters.keys() == point.parameters.keys()
        for name in point.parameters.keys() - {*symmetry.parameters, *symmetry.buffers}:
            assert same.parameters[name] is point.parameters[name]


@every_case
@pytest.mark.parametrize("tasks", [0, TASKS])
def test_multipliers_move_as_the_action_does(case: Case, tasks: int) -> None:
    problem = case.problem()
    point = problem.point()
    if tasks:
        point = point.map(lambda value: torch.stack([(1 + task) * value for task in range(tasks)]))
    for symmetry in problem.symmetries:
        element = symmetry.group.random(*(tasks,) * bool(tasks), size=0.5, seed=1, dtype=torch.float64)
        factors = symmetry.multipliers(element, "vectors")
        assert (factors is not None) == isinstance(symmetry, mt.Rescaling)
        if factors is None:
            assert symmetry.multipliers(element, "squares") is None
            continue
        arrived, squares = symmetry.act(element, point), point.gradients
        on, on_squares = symmetry.multipliers(element, "covectors"), symmetry.multipliers(element, "squares")
        assert on is not None
        assert on_squares is not None
        moved_squares = symmetry.carry_squares(element, squares, point).tensors
        assert set(factors) == set(on) == set(on_squares) == set(symmetry.parameters)
        for name in symmetry.parameters:
            assert torch.equal(point.parameters[name] * factors[name], arrived.parameters[name])
            assert torch.equal(point.gradients[name] * on[name], arrived.gradients[name])
            assert torch.equal(squares[name] * on_squares[name], moved_squares[name])
            assert arrived.parameters[name] is not point.parameters[name]
        rest = symmetry.act(element, point.replace(parameters={}, gradients={}))
        assert not rest.parameters
        assert all(torch.equal(rest.activations[name], value) for name, value in arrived.activations.items())


def test_a_subclass_that_acts_otherwise_has_no_multipliers() -> None:
    class Own(mt.Rescaling):
        def act(self, element: Tensor, point: Point) -> Point:
            return super().act(element, point)

    class Named(mt.Rescaling):
        kind = "named"

    class Acts:
        def act(self, element: Tensor, point: Point) -> Point:
            return point

    class Mixed(Acts, mt.Rescaling):
        kind = "mixed"

    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    element = torch.ones(3)
    assert Own(model, "0", "2").multipliers(element, "vectors") is None
    assert Mixed(model, "0", "2").multipliers(element, "vectors") is None
    assert Named(model, "0", "2").multipliers(element, "vectors") is not None


@pytest.mark.parametrize("case", [each for each in CASES if each.group_law], ids=str)
def test_the_way_back_returns_the_weights(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    for symmetry in problem.symmetries:
        element = elements(symmetry)
        there = symmetry.act(element, start)
        back = symmetry.act(symmetry.group.inverse(element), there)
        assert_close(back.parameters, start.parameters)
        assert_close(back.gradients, start.gradients, 1e-8)


@pytest.mark.parametrize("case", [each for each in CASES if each.group_law], ids=str)
def test_acting_twice_is_acting_with_the_product(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    for symmetry in problem.symmetries:
        left, right = elements(symmetry, seed=1), elements(symmetry, seed=2)
        twice = symmetry.act(left, symmetry.act(right, start))
        once = symmetry.act(symmetry.group.compose(left, right), start)
        assert_close(twice.parameters, once.parameters)
        assert_close(twice.gradients, once.gradients, 1e-8)


@every_case
def test_what_is_carried_equals_a_fresh_evaluation(case: Case) -> None:
    problem = case.problem()
    arrived = moved(case, problem.point())
    fresh = problem.point(arrived.parameters)
    assert not arrived.stale
    assert_close(arrived.gradients, fresh.gradients, 1e-8)
    assert_close(arrived.activations, fresh.activations)
    assert_close(arrived.cotangents, fresh.cotangents, 1e-8)
    assert float(arrived.loss) == pytest.approx(float(fresh.loss), rel=1e-9)


@every_case
def test_stacked_tasks_are_carried_like_fresh_ones(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    arrived = moved(case, stacked.point_at(stacked.tensors(), batch))
    fresh = stacked.point_at(arrived.parameters, batch)
    assert_close(arrived.gradients, fresh.gradients, 1e-8)
    assert_close(arrived.activations, fresh.activations)
    assert_close(arrived.cotangents, fresh.cotangents, 1e-8)
    assert torch.allclose(arrived.loss, fresh.loss, rtol=1e-9)


@every_case
def test_each_stacked_task_moves_like_a_single_one(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    together = stacked.point_at(stacked.tensors(), batch)
    chosen = {id(s): elements(s, TASKS, seed=5) for s in stacked.symmetries}
    for symmetry in reversed(stacked.symmetries):
        together = symmetry.act(chosen[id(symmetry)], together)
    for task in range(TASKS):
        problem = case.problem(task)
        alone = problem.point()
        for symmetry, twin in zip(reversed(problem.symmetries), reversed(stacked.symmetries), strict=True):
            alone = symmetry.act(chosen[id(twin)][task], alone)
        assert_close({name: value[task] for name, value in together.parameters.items()}, alone.parameters)
        assert_close({name: value[task] for name, value in together.gradients.items()}, alone.gradients)
        assert_close({name: value[task] for name, value in together.cotangents.items()}, alone.cotangents)


@exact_case
@pytest.mark.parametrize("tasks", [None, TASKS])
def test_gradients_are_carried_as_covectors(case: Case, tasks: int | None) -> None:
    if tasks is None:
        problem = case.problem()
        symmetries, start, evaluate = problem.symmetries, problem.point(), problem.point
    else:
        stacked, batch = case.stack(tasks)
        symmetries, start = stacked.symmetries, stacked.point_at(stacked.tensors(), batch)
        evaluate = lambda parameters: stacked.point_at(parameters, batch)  # noqa: E731
    for symmetry in symmetries:
        element = elements(symmetry, *(() if tasks is None else (tasks,)))
        carried = symmetry.carry_covectors(element, start.gradients, start)
        fresh = evaluate(symmetry.act(element, start).parameters)
        assert carried.exact
        assert_close(carried.tensors, {name: fresh.gradients[name] for name in symmetry.parameters}, 1e-8)


@exact_case
def test_a_covector_keeps_its_pairing_with_a_vector(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    for symmetry in problem.symmetries:
        element = elements(symmetry)
        names = symmetry.parameters
        vectors = {name: torch.randn_like(start.parameters[name]) for name in names}
        covectors = {name: torch.randn_like(start.parameters[name]) for name in names}

        def act(parameters: dict[str, Tensor], symmetry: mt.Symmetry = symmetry, element: Tensor = element) -> dict:
            point = Point({**start.parameters, **parameters}, activations=start.activations)
            return {name: symmetry.act(element, point).parameters[name] for name in symmetry.parameters}

        here = {name: start.parameters[name] for name in names}
        _, pushed = torch.func.jvp(act, (here,), (vectors,))
        carried = symmetry.carry_covectors(element, covectors, start).tensors
        before = sum((covectors[name] * vectors[name]).sum() for name in names)
        after = sum((carried[name] * pushed[name]).sum() for name in names)
        assert torch.allclose(before, after, rtol=1e-10)


@pytest.mark.parametrize("case", [each for each in EXACT if each.diagonal], ids=str)
def test_squares_are_carried_exactly_by_diagonals(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    for symmetry in problem.symmetries:
        element = elements(symmetry)
        squares = {name: value.square() for name, value in start.gradients.items()}
        carried = symmetry.carry_squares(element, squares, start)
        fresh = symmetry.carry_covectors(element, start.gradients, start).tensors
        assert carried.exact
        assert_close(carried.tensors, {name: value.square() for name, value in fresh.items()})


@pytest.mark.parametrize("case", [each for each in CASES if each.group_law and not each.diagonal], ids=str)
def test_squares_are_carried_as_means_over_uncorrelated_entries(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    symmetry = problem.symmetries[-1]
    element = elements(symmetry, size=0.5)
    source = torch.Generator().manual_seed(0)
    deviations = {
        n: torch.rand(start.parameters[n].shape, generator=source).double() + 0.5 for n in symmetry.parameters
    }
    total = {name: torch.zeros_like(value) for name, value in deviations.items()}
    draws = 1500
    for _ in range(draws):
        covectors = {n: d * torch.randn(d.shape, generator=source, dtype=torch.float64) for n, d in deviations.items()}
        for name, value in symmetry.carry_covectors(element, covectors, start).tensors.items():
            total[name] += value.square() / draws
    carried = symmetry.carry_squares(element, {n: d.square() for n, d in deviations.items()}, start)
    assert not carried.exact
    for name, value in carried.tensors.items():
        assert torch.allclose(total[name], value, rtol=0.15), name


@exact_case
def test_matrices_transform_with_the_group(case: Case) -> None:
    if case.name == "quadratic":
        pytest.skip("its matrices are coordinates, not covariances")
    problem = case.problem()
    start = problem.point()
    for symmetry in problem.symmetries:
        element = elements(symmetry)
        g = torch.diag(element) if element.ndim == 1 else element
        inverse = torch.linalg.inv(g)
        here, there = symmetry.matrices(start), symmetry.matrices(symmetry.act(element, start))
        into = {
            "incoming_covariance": (g, g.mT),
            "outgoing_covariance": (inverse.mT, inverse),
            "feature_covariance": (g, g.mT),
            "incoming_gradient_covariance": (inverse.mT, inverse),
            "outgoing_gradient_covariance": (g, g.mT),
            "outgoing_moment": (inverse.mT, g.mT),
            "incoming_moment": (inverse.mT, g.mT),
        }
        # What stands before a norm has nothing behind it; translations have no such matrices at all.
        assert set(here) == set(into) if isinstance(symmetry, Pair) else set(here) <= set(into)
        for name, value in here.items():
            left, right = into[name]
            assert relative(there[name], left @ value @ right) <= 1e-9, name


@every_case
def test_actions_are_differentiable_in_the_element_and_in_the_weights(case: Case) -> None:
    problem = case.problem()
    start = problem.point()
    for symmetry in problem.symmetries:
        names = symmetry.parameters
        generator = symmetry.group.random_generator(size=0.5, seed=3, dtype=torch.float64).requires_grad_()
        weights = tuple(start.parameters[name].detach().requires_grad_() for name in names)

        def act(
            t: Tensor, *values: Tensor, symmetry: mt.Symmetry = symmetry, names: tuple[str, ...] = names
        ) -> tuple[Tensor, ...]:
            point = start.update(parameters=dict(zip(names, values, strict=True)))
            arrived = symmetry.act(symmetry.group.exp(t), point)
            moved = (each[name] for each in (arrived.parameters, arrived.gradients) for name in names)
            return tuple(value for value in moved if value.requires_grad)

        assert torch.autograd.gradcheck(act, (generator, *weights), fast_mode=True)


@every_case
def test_an_action_at_a_point_is_the_action(case: Case) -> None:
    """Every element of it, and its gradients where nothing else is asked for."""
    point = case.problem().point()
    for symmetry in case.problem().symmetries:
        act, gradients_of = symmetry.action_at(point), symmetry.action_at(point, gradients_only=True)
        for seed in (0, 1):
            element = elements(symmetry, seed=seed)
            expected, found, bare = symmetry.act(element, point), act(element), gradients_of(element)
            assert_close(found.parameters, expected.parameters, 1e-12)
            for mine in (found, bare):
                assert mine.stale == expected.stale
                assert_close(mine.gradients, expected.gradients, 1e-12)
                assert_close(mine.cotangents, expected.cotangents, 1e-12)
            # What is left out is not what it was before: reading it fails.
            for name in bare.parameters:
                assert relative(bare.parameters[name], expected.parameters[name]) < 1e-12


@exact_case
def test_exact_symmetries_always_hold(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    point = stacked.point_at(stacked.tensors(), batch)
    for symmetry in stacked.symmetries:
        assert symmetry.holds(point).tolist() == [True] * TASKS
        assert symmetry.rebuild_cost(point) == 0


def test_float32_invariance() -> None:
    for each in CASES:
        problem = each.problem()
        problem.model.float()
        problem.inputs = tuple(value.float() for value in problem.inputs)
        problem.targets = tuple(value.float() for value in problem.targets)
        point = problem.point()
        for symmetry in reversed(problem.symmetries):
            point = symmetry.act(symmetry.group.random(size=0.5, seed=1, dtype=torch.float32), point)
        assert {value.dtype for value in point.parameters.values()} == {torch.float32}
        assert relative(problem.outputs(point.parameters), problem.outputs()) < 1e-3, each.name


def test_a_symmetry_keeps_no_tensor_of_its_model() -> None:
    for each in CASES:
        for symmetry in each.problem().symmetries:
            assert not any(isinstance(value, Tensor | nn.Parameter) for value in vars(symmetry).values())
            copy.deepcopy(symmetry)
