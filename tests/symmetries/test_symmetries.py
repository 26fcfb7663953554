"""Every symmetry as an action: invariance, group laws, and what is carried along."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from symmetry_cases import CASES, Case, assert_close, case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.point import Point
from metateleport.symmetries import (
    HOMOGENEOUS,
    BatchPair2022,
    BatchPair2024,
    Pair,
    QuadraticRotation,
    Unsuitable,
    inverse_of,
    slope,
)

TASKS = 3
EXACT = [each for each in CASES if each.exact]
BATCH = [each for each in CASES if not each.exact]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
exact_case = pytest.mark.parametrize("case", EXACT, ids=str)


def elements(symmetry: mt.Symmetry, *batch: int, size: float = 1.0, seed: int = 0) -> Tensor:
    return symmetry.group.random(*batch, size=size, seed=seed, dtype=torch.float64)


def moved(case: Case, point: Point, size: float = 1.0, seed: int = 0) -> Point:
    """The point moved along all symmetries of a case, last layer first."""
    batch = () if point.loss is None else point.loss.shape
    for index, symmetry in enumerate(reversed(case.problem().symmetries)):
        point = symmetry.act(elements(symmetry, *batch, size=size, seed=10 * seed + index), point)
    return point


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


@pytest.mark.parametrize("case", BATCH, ids=str)
def test_batch_pairs_do_not_hold_elsewhere(case: Case) -> None:
    problem, inputs = case.problem(), case.fresh_inputs()
    arrived = moved(case, problem.point())
    assert relative(problem.outputs(arrived.parameters, inputs), problem.outputs(inputs=inputs)) > 1e-3


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


def test_the_2024_form_has_no_group_law_below_its_width() -> None:
    problem = case("2024 form").problem()
    (symmetry,), start = problem.symmetries, problem.point()
    element = elements(symmetry)
    back = symmetry.act(symmetry.group.inverse(element), symmetry.act(element, start))
    assert relative(back.parameters["2.weight"], start.parameters["2.weight"]) > 1e-3
    assert relative(problem.outputs(back.parameters), problem.outputs()) <= 1e-9


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


@exact_case
def test_exact_symmetries_always_hold(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    point = stacked.point_at(stacked.tensors(), batch)
    for symmetry in stacked.symmetries:
        assert symmetry.holds(point).tolist() == [True] * TASKS
        assert symmetry.rebuild_cost(point) == 0


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


# What a symmetry refuses.


def _linear(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def _tied() -> nn.Sequential:
    model = _linear(3, 3, 3)
    model[1].weight = model[0].weight
    return model


def _one_layer_twice() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _frozen(name: str) -> nn.Sequential:
    model = _linear(3, 4, 2)
    model.get_parameter(name).requires_grad_(False)
    return model


def _normed() -> nn.Sequential:
    model = _linear(3, 4, 2)
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _old_normed() -> nn.Sequential:
    model = _linear(3, 4, 2)
    nn.utils.spectral_norm(model[1])
    return model


REFUSED: list[tuple[str, Callable[[], object], str]] = [
    ("unknown first", lambda: mt.LinearPair(_linear(3, 4, 2), "7", "1"), "no module named '7'.*'0', '1'"),
    ("unknown second", lambda: mt.Rescaling(_linear(3, 4, 2), "0", "fc"), "no module named 'fc'"),
    ("another type", lambda: mt.LinearPair(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "0", "1"), "'0' is a ReLU"),
    ("convolution", lambda: mt.LinearPair(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), "0", "1"), "Conv1d"),
    (
        "transposed",
        lambda: mt.Rescaling(nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Linear(2, 2)), "0", "1"),
        "Trans",
    ),
    ("sizes", lambda: mt.LinearPair(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "0", "1"), "outputs 4 .* reads 5"),
    (
        "multiple",
        lambda: mt.Rescaling(nn.Sequential(nn.Linear(3, 4), nn.Linear(8, 2)), "0", "1"),
        "outputs 4 .* reads 8",
    ),
    (
        "channels",
        lambda: mt.Rescaling(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(8, 2, 1)), "0", "1"),
        "outputs 4 .* reads 8",
    ),
    (
        "grouped",
        lambda: mt.Rescaling(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1, groups=2)), "0", "1"),
        "in each group",
    ),
    ("itself", lambda: mt.LinearPair(_linear(3, 3), "0", "0"), "same layer"),
    ("one layer twice", lambda: mt.Rescaling(_one_layer_twice(), "0", "2"), "same layer"),
    ("tied weights", lambda: mt.LinearPair(_tied(), "0", "1"), "shared"),
    ("frozen weight", lambda: mt.LinearPair(_frozen("1.weight"), "0", "1"), "'1.weight' is frozen"),
    ("frozen bias", lambda: mt.LinearPair(_frozen("0.bias"), "0", "1"), "'0.bias' is frozen"),
    ("weight norm", lambda: mt.LinearPair(_normed(), "0", "1"), "not a plain parameter"),
    ("spectral norm", lambda: mt.LinearPair(_old_normed(), "0", "1"), "not a plain parameter"),
    ("no inverse", lambda: BatchPair2022(_linear(3, 4, 2), "0", "1", nn.Tanh()), "no known inverse.*2024"),
    ("half inverse", lambda: BatchPair2022(_linear(3, 4, 2), "0", "1", nn.ReLU()), "no known inverse"),
    ("no module", lambda: BatchPair2024(_linear(3, 4, 2), "0", "1", torch.tanh), "give the activation as a module"),
    ("with parameters", lambda: BatchPair2024(_linear(3, 4, 2), "0", "1", nn.PReLU()), "parameters of its own"),
    ("no vector", lambda: QuadraticRotation(_linear(3, 4), "x"), "no vector named 'x'.*0.weight"),
    ("a matrix", lambda: QuadraticRotation(_linear(3, 4), "0.weight"), "no vector named"),
    ("frozen vector", lambda: QuadraticRotation(_frozen("0.bias"), "0.bias"), "frozen"),
]


@pytest.mark.parametrize(("build", "says"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_unsuitable_models_are_refused_by_name(build: Callable[[], object], says: str) -> None:
    with pytest.raises(Unsuitable, match=f"(?s){says}"):
        build()


def test_an_unfrozen_second_bias_may_be_anything() -> None:
    assert mt.LinearPair(_frozen("1.bias"), "0", "1").parameters == ("0.weight", "0.bias", "1.weight")


# Activations.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "activation",
    [
        nn.Identity(),
        nn.ReLU(),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.3),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.ELU(),
        nn.Softplus(),
    ],
    ids=repr,
)
def test_slopes_are_those_of_autograd(activation: nn.Module, dtype: torch.dtype) -> None:
    z = torch.randn(50, dtype=dtype, requires_grad=True)
    z.data[0] = 0.0
    (expected,) = torch.autograd.grad(activation(z).sum(), z)
    for value in (None, activation(z).detach()):
        found = slope(activation, z.detach(), value)
        assert found.dtype == dtype
        assert torch.allclose(found, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.LeakyReLU(0.1), nn.LeakyReLU(3.0)], ids=repr)
def test_inverses_undo_both_ways(activation: nn.Module) -> None:
    z = torch.randn(50, dtype=torch.float64)
    inverse = inverse_of(activation)
    assert inverse is not None
    assert torch.allclose(inverse(activation(z)), z, rtol=1e-14)
    assert torch.allclose(activation(inverse(z)), z, rtol=1e-14)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.1), nn.Tanh(), nn.GELU()], ids=repr
)
def test_no_inverse_is_claimed_where_there_is_none(activation: nn.Module) -> None:
    assert inverse_of(activation) is None


@pytest.mark.parametrize("kind", HOMOGENEOUS)
def test_homogeneous_activations_are(kind: type[nn.Module]) -> None:
    activation = kind().double()
    z = torch.randn(20, dtype=torch.float64)
    assert torch.allclose(activation(2.5 * z), 2.5 * activation(z), rtol=1e-14)


def test_a_symmetry_keeps_no_tensor_of_its_model() -> None:
    for each in CASES:
        for symmetry in each.problem().symmetries:
            assert not any(isinstance(value, Tensor | nn.Parameter) for value in vars(symmetry).values())
            copy.deepcopy(symmetry)
