"""Every teleporter on every kind of symmetry: what moves, what is reported, what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from symmetry_cases import CASES, Case, assert_close, case, meeting, relative
from teleporter_cases import TELEPORTERS, Make
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import point_of
from metateleport.objectives import Objective, SquaredGradientNorm
from metateleport.point import Point
from metateleport.symmetries import BatchPair2022, BatchPair2024, Unsuitable
from metateleport.teleporters import TrustRegion, travel

TASKS = 3
FREE = ("null-space", "level-set")

every_case = pytest.mark.parametrize("case", CASES, ids=str)
each_teleporter = pytest.mark.parametrize("make", TELEPORTERS.values(), ids=list(TELEPORTERS))
along_symmetries = pytest.mark.parametrize(
    "make",
    [make for name, make in TELEPORTERS.items() if name not in FREE],
    ids=[n for n in TELEPORTERS if n not in FREE],
)


class Fixed(mt.Teleporter):
    """Proposes what it is told to."""

    name = "fixed"

    def __init__(self, propose: Callable[[mt.Symmetry, tuple[int, ...]], Tensor], **region: Any) -> None:
        super().__init__(**region)
        self.propose = propose

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        return self.propose(symmetry, () if point.loss is None else tuple(point.loss.shape)), state


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def untouched(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def gradient_norm(problem: Any) -> float:
    parameters = list(problem.model.parameters())
    gradients = torch.autograd.grad(problem.loss_of(problem.model(*problem.inputs)), parameters)
    return math.sqrt(sum(float(value.square().sum()) for value in gradients))


def moved_weights(symmetries: Sequence[mt.Symmetry], values: dict[str, Tensor]) -> float:
    names = {name for symmetry in symmetries for name in symmetry.parameters}
    return sum(float(values[name].square().sum()) / 2 for name in names)


@pytest.mark.parametrize(("name", "case"), meeting(list(TELEPORTERS), CASES), ids=str)
def test_every_teleporter_on_every_kind_of_symmetry(name: str, case: Case) -> None:
    _teleports(name, case)


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("name", TELEPORTERS)
def test_every_teleporter_in_every_case(name: str) -> None:
    for each in CASES:
        _teleports(name, each)


def _teleports(name: str, case: Case) -> None:
    problem = case.problem()
    teleporter = TELEPORTERS[name](problem.symmetries)
    before, outputs = snapshot(problem.model), problem.outputs()
    loss, norm = float(problem.loss_of(outputs)), gradient_norm(problem)
    marker = torch.ones(1, dtype=torch.float64)
    next(problem.model.parameters()).grad = marker.expand_as(next(problem.model.parameters())).clone()

    report = mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)

    after, now = problem.outputs(), snapshot(problem.model)
    assert report.accepted
    assert report.reason == "" if report.size > 0 else "nothing moves" in report.reason
    assert report.teleporter == teleporter.name
    assert report.loss_before == pytest.approx(loss, rel=1e-12)
    assert report.loss_after == pytest.approx(float(problem.loss_of(after)), rel=1e-12)
    if teleporter.keeps == "outputs":
        assert relative(after, outputs) <= 1e-9
        assert report.drift == pytest.approx(relative(after, outputs), abs=1e-15)
    else:
        assert report.loss_after == pytest.approx(loss, rel=1e-9)
        assert report.drift == pytest.approx(abs(report.loss_after - loss) / loss, abs=1e-12)
    assert report.gradient_norm_before == pytest.approx(norm, rel=1e-10)
    assert report.gradient_norm_after == pytest.approx(gradient_norm(problem), rel=1e-7)
    assert report.size == pytest.approx(math.hypot(*report.sizes))
    assert report.evaluations >= 4 / 3 - 1e-9
    assert report.seconds > 0
    assert bool((next(problem.model.parameters()).grad == 1).all())
    assert all(bool(value.isfinite().all()) for value in now.values())
    if teleporter.needs_symmetries:
        _moved_along_symmetries(problem, teleporter, report, before, now)
    else:
        assert len(report.sizes) == 1
        change = sum(float((now[name] - value).double().square().sum()) for name, value in before.items())
        assert report.size == pytest.approx(change**0.5, rel=1e-9)
        assert report.size > 0 or list(report.failures) == ["no gain"]
        halves = [
            sum(float(p.square().sum()) / 2 for n, p in at.items() if _weight(problem, n)) for at in (before, now)
        ]
        assert report.weight_decay_change == pytest.approx(halves[1] - halves[0], rel=1e-9, abs=1e-12)
    if report.size > 0 and report.gain == report.gain:
        assert report.gain > 0
        assert report.failures == {}


def _weight(problem: Any, name: str) -> bool:
    return name in dict(problem.model.named_parameters())


def _moved_along_symmetries(
    problem: Any,
    teleporter: mt.Teleporter,
    report: mt.TeleportReport,
    before: dict[str, Tensor],
    now: dict[str, Tensor],
) -> None:
    change = moved_weights(problem.symmetries, now) - moved_weights(problem.symmetries, before)
    assert report.weight_decay_change == pytest.approx(change, rel=1e-9, abs=1e-12)
    assert len(report.sizes) == len(problem.symmetries)
    if teleporter.name == "none":
        assert untouched(problem.model, before)
        assert report.size == 0
    for symmetry, size in zip(problem.symmetries, report.sizes, strict=True):
        if isinstance(teleporter, mt.NoTeleport):
            continue
        if isinstance(teleporter, mt.WhiteningTeleporter):
            needed = {"incoming_covariance"} | ({"outgoing_covariance"} if teleporter.side != "features" else set())
            if not needed <= symmetry.matrices(problem.point()).keys():
                continue
        # A curve of translations is straight, and a bias may leave the loss around it as it was.
        if isinstance(teleporter, mt.GradientAscentTeleporter) and size == 0:
            assert not isinstance(teleporter.objective, SquaredGradientNorm)
            continue
        assert not torch.equal(now[symmetry.parameters[0]], before[symmetry.parameters[0]])
    moving = {name for each in problem.symmetries for name in (*each.parameters, *each.buffers)}
    for name in now.keys() - moving:
        assert torch.equal(now[name], before[name])
    if teleporter.name == "random":
        assert report.sizes == pytest.approx([0.7] * len(problem.symmetries))
    if isinstance(teleporter, mt.GradientAscentTeleporter):
        assert all(size <= 0.5 + 1e-12 for size in report.sizes)
        if isinstance(teleporter.objective, SquaredGradientNorm):
            ratio = report.gradient_norm_after / report.gradient_norm_before
            assert (ratio - 1) * teleporter.ascent.sign > 1e-4


STACKED = [name for name in TELEPORTERS if name not in ("sharpness", "curvature")]


@pytest.mark.parametrize(("name", "case"), meeting(STACKED, CASES), ids=str)
def test_stacked_tasks_travel_like_single_ones(name: str, case: Case) -> None:
    _travel_together(name, case)


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("name", STACKED)
def test_stacked_tasks_travel_like_single_ones_in_every_case(name: str) -> None:
    for each in CASES:
        _travel_together(name, each)


def _travel_together(name: str, case: Case) -> None:
    make = TELEPORTERS[name]
    stacked, batch = case.stack(TASKS)
    start = stacked.point_at(stacked.tensors(), batch)
    teleporter = make(stacked.symmetries)
    arrived, moves, _ = travel(teleporter, start, stacked.symmetries)
    assert torch.allclose(stacked.losses_at(arrived.parameters, batch), start.loss, rtol=1e-9)
    assert_close(arrived.gradients, stacked.point_at(arrived.parameters, batch).gradients, 1e-8)
    if teleporter.needs_symmetries:
        assert [move.symmetry for move in moves] == list(reversed(stacked.symmetries))
    assert not any(bool(move.refused.any()) or move.reason for move in moves)
    for move in moves:
        assert move.size.shape == move.refused.shape == move.evaluations.shape == (TASKS,)
        assert move.gain is None or move.gain.shape == (TASKS,)
    if teleporter.name not in ("random", "none"):
        for task in (0, TASKS - 1):
            problem = case.problem(task)
            point = point_of(problem.model, stacked.symmetries, problem.inputs, None, problem.loss_of)[0]
            alone, _, _ = travel(make(stacked.symmetries), point, stacked.symmetries)
            assert_close({name: value[task] for name, value in arrived.parameters.items()}, alone.parameters, 1e-6)


def test_evaluations_are_counted() -> None:
    def spent(name: str, teleporter: mt.Teleporter, loss: bool = True) -> float:
        problem = case(name).problem()
        return mt.teleport(
            problem.model, teleporter, problem.inputs, problem.loss_of if loss else None, problem.symmetries
        ).evaluations

    ascent = mt.GradientAscentTeleporter(steps=3, step_size=0.01)
    assert spent("linear pair", mt.RandomTeleporter(seed=0), loss=False) == pytest.approx(2 / 3)
    assert spent("linear pair", mt.RandomTeleporter(seed=0)) == pytest.approx(4 / 3)
    assert spent("linear pair", ascent) == pytest.approx(4 / 3)
    # A third to rebuild what is kept; each ascent step differentiates a rebuilt third.
    assert spent("2022 form", mt.RandomTeleporter(seed=0)) == pytest.approx(4 / 3 + 1 / 3)
    assert spent("2022 form", ascent) == pytest.approx(4 / 3 + 1 / 3 + 3)
    assert spent("2022 form", mt.NoTeleport()) == pytest.approx(4 / 3)


# Refusals.


def _nan(symmetry: mt.Symmetry, batch: tuple[int, ...]) -> Tensor:
    generator = symmetry.group.random_generator(*batch, seed=0, dtype=torch.float64)
    generator[..., 0] = float("nan")
    return generator


REFUSALS: list[tuple[str, Callable[[], mt.Teleporter], str]] = [
    ("too large", lambda: mt.RandomTeleporter(5.0, 0, trust_region=TrustRegion(max_size=1.0)), "larger than 1"),
    ("beyond all", lambda: mt.RandomTeleporter(1e4, 0), "larger than 100"),
    (
        "ill conditioned",
        lambda: mt.RandomTeleporter(2.0, 0, trust_region=TrustRegion(max_condition=1.01)),
        "condition number is above 1.0e\\+00",
    ),
    (
        "overflowing",
        lambda: Fixed(
            lambda symmetry, batch: 2000 * symmetry.group.random_generator(*batch, seed=0, dtype=torch.float64),
            trust_region=TrustRegion(max_size=1e6),
        ),
        "condition number|would change",
    ),
    ("not a number", lambda: Fixed(_nan), "not finite"),
    ("infinite", lambda: Fixed(lambda symmetry, batch: _nan(symmetry, batch) * float("inf")), "not finite"),
]


@every_case
@pytest.mark.parametrize(("make", "says"), [each[1:] for each in REFUSALS], ids=[each[0] for each in REFUSALS])
def test_what_is_refused_leaves_the_weights_bit_for_bit(
    case: Case, make: Callable[[], mt.Teleporter], says: str
) -> None:
    if not case.conditioned and "condition" in says:
        pytest.skip("its elements are always well conditioned")
    problem = case.problem()
    before = snapshot(problem.model)
    for loss in (problem.loss_of, None):
        report = mt.teleport(problem.model, make(), problem.inputs, loss, problem.symmetries)
        assert untouched(problem.model, before)
        assert not report.accepted
        assert pytest.approx(0) == report.size == report.drift == report.weight_decay_change
        assert set(report.sizes) == {0.0}
        assert loss is None or report.loss_before == report.loss_after
        assert re.search(says, report.reason)


def test_a_drift_that_is_too_large_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    before = snapshot(model)
    claimed = [mt.Rescaling(model, "0", "2")]
    x = torch.randn(6, 3, dtype=torch.float64)
    report = mt.teleport(model, mt.RandomTeleporter(seed=0), x, lambda out: out.square().sum(), claimed)
    assert not report.accepted
    assert "outputs would change by" in report.reason
    assert report.loss_after == report.loss_before
    assert report.gradient_norm_after == report.gradient_norm_before
    assert untouched(model, before)
    generous = mt.RandomTeleporter(seed=0, trust_region=TrustRegion(max_drift=10.0))
    report = mt.teleport(model, generous, x, None, claimed)
    assert report.accepted
    assert 0.01 < report.drift < 10
    assert not untouched(model, before)


@pytest.mark.parametrize("kind", [BatchPair2022, BatchPair2024])
@along_symmetries
def test_more_samples_than_width_are_refused(kind: type, make: Make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)).double()
    before = snapshot(model)
    x = torch.randn(9, 4, dtype=torch.float64)
    symmetries = [kind(model, "0", "2", model[1])]
    report = mt.teleport(model, make(symmetries), x, lambda out: out.square().sum(), symmetries)
    assert untouched(model, before)
    assert not report.accepted
    assert "does not hold on this batch" in report.reason


def test_one_refused_symmetry_does_not_stop_the_others() -> None:
    problem = case("chain of rescalings").problem()
    before, outputs = snapshot(problem.model), problem.outputs()
    bad = problem.symmetries[1]
    teleporter = Fixed(
        lambda symmetry, batch: (
            _nan(symmetry, batch) if symmetry is bad else symmetry.group.random_generator(seed=0, dtype=torch.float64)
        )
    )
    report = mt.teleport(problem.model, teleporter, problem.inputs, None, problem.symmetries)
    assert report.accepted
    assert report.sizes == pytest.approx((1.0, 0.0))
    assert "not finite" in report.reason
    assert repr(bad) in report.reason
    now = snapshot(problem.model)
    assert torch.equal(now["4.weight"], before["4.weight"])
    assert not torch.equal(now["0.weight"], before["0.weight"])
    assert relative(problem.outputs(), outputs) <= 1e-12


def _of_task(task: int, spoil: Callable[[Tensor], Tensor]) -> Fixed:
    def propose(symmetry: mt.Symmetry, batch: tuple[int, ...]) -> Tensor:
        generator = symmetry.group.random_generator(*batch, size=0.5, seed=0, dtype=torch.float64)
        generator[task] = spoil(generator[task])
        return generator

    return Fixed(propose, trust_region=TrustRegion(max_size=5000.0))


SPOILED: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("not a number", lambda generator: generator * float("nan"), "not finite"),
    ("too large", lambda generator: generator * 1e6, "larger than 5000"),
    ("overflowing", lambda generator: generator * 5000, "condition number"),
]


@every_case
@pytest.mark.parametrize(("spoil", "says"), [each[1:] for each in SPOILED], ids=[each[0] for each in SPOILED])
def test_refused_tasks_of_a_stack_stay_bit_for_bit_while_others_move(
    case: Case, spoil: Callable[[Tensor], Tensor], says: str
) -> None:
    if not case.conditioned and "condition" in says:
        pytest.skip("its elements are always well conditioned")
    stacked, batch = case.stack(TASKS)
    start = stacked.point_at(stacked.tensors(), batch)
    arrived, moves, _ = travel(_of_task(1, spoil), start, stacked.symmetries)
    free, _, _ = travel(_of_task(1, lambda generator: generator), start, stacked.symmetries)
    for mine in ("parameters", "gradients", "activations", "cotangents"):
        for name, value in getattr(start, mine).items():
            assert torch.equal(getattr(arrived, mine)[name][1], value[1]), name
            for task in (0, 2):
                assert torch.equal(getattr(arrived, mine)[name][task], getattr(free, mine)[name][task]), name
    for move in moves:
        assert move.refused.tolist() == [False, True, False]
        assert move.size.tolist() == pytest.approx([0.5, 0.0, 0.5])
        assert says in move.reason
        assert move.evaluations[1] == 0
        one = move.symmetry.group.identity(dtype=torch.float64)
        assert torch.allclose(move.element[1], one, atol=1e-15)


@every_case
def test_tasks_that_may_not_move_stay(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    start = stacked.point_at(stacked.tensors(), batch)
    allowed = torch.tensor([True, True, False])
    arrived, moves, _ = travel(mt.RandomTeleporter(seed=0), start, stacked.symmetries, allowed=allowed)
    moved = {name for symmetry in stacked.symmetries for name in symmetry.parameters}
    for name, value in start.parameters.items():
        assert torch.equal(arrived.parameters[name][2], value[2])
    assert any(not torch.equal(arrived.parameters[name][0], start.parameters[name][0]) for name in moved)
    assert all(move.reason == "moving was not allowed" for move in moves)


@every_case
def test_a_refused_task_puts_no_nan_into_the_gradients_of_the_others(case: Case) -> None:
    if not case.conditioned:
        pytest.skip("its elements do not overflow")
    stacked, batch = case.stack(TASKS)
    start = stacked.point_at(stacked.tensors(), batch)
    scale = torch.ones(TASKS, dtype=torch.float64)
    scale[1] = 1e4
    knob = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def propose(symmetry: mt.Symmetry, batch: tuple[int, ...]) -> Tensor:
        generator = symmetry.group.random_generator(*batch, seed=0, dtype=torch.float64)
        return generator * symmetry.group.expand(knob * scale)

    teleporter = Fixed(propose, trust_region=TrustRegion(max_size=1e6))
    arrived, moves, _ = travel(teleporter, start, stacked.symmetries)
    assert all(move.refused.tolist() == [False, True, False] for move in moves)
    total = sum(value.square().sum() for value in arrived.gradients.values())
    (slope,) = torch.autograd.grad(total, knob)
    assert bool(slope.isfinite())
    assert float(slope) != 0


@pytest.mark.parametrize("name", ["2022 form", "2024 form", "mixed chain", "rescaling", "linear pair"])
@each_teleporter
def test_a_task_that_diverged_stops_no_other(name: str, make: Make) -> None:
    stacked, (inputs, targets) = case(name).stack(TASKS)
    inputs[0][1] = float("nan")
    start = stacked.point_at(stacked.tensors(), (inputs, targets))
    teleporter = make(stacked.symmetries)
    arrived, moves, _ = travel(teleporter, start, stacked.symmetries)
    healthy = [0, 2]
    before = stacked.losses_at(start.parameters, (inputs, targets))
    after = stacked.losses_at(arrived.parameters, (inputs, targets))
    assert torch.allclose(after[healthy], before[healthy], rtol=1e-9)
    for value in arrived.parameters.values():
        assert bool(value[healthy].isfinite().all())
    if teleporter.name == "random":
        assert all(bool((move.size[healthy] > 0).all()) for move in moves)


# Single teleporters.


def test_random_elements_have_their_size_and_come_from_their_seed() -> None:
    weights = []
    for seed in (0, 0, 1):
        problem = case("chain of linear pairs").problem()
        teleporter = mt.RandomTeleporter(size=0.3, seed=seed)
        report = mt.teleport(problem.model, teleporter, problem.inputs, None, problem.symmetries)
        assert report.sizes == pytest.approx((0.3, 0.3), rel=1e-12)
        assert report.size == pytest.approx(0.3 * math.sqrt(2))
        again = mt.teleport(problem.model, teleporter, problem.inputs, None, problem.symmetries)
        assert again.accepted
        weights.append(problem.model[0].weight.detach().clone())  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    source = torch.Generator().manual_seed(0)
    problem = case("chain of linear pairs").problem()
    for _ in range(2):
        mt.teleport(problem.model, mt.RandomTeleporter(0.3, generator=source), problem.inputs, None, problem.symmetries)
    assert torch.equal(problem.model[0].weight, weights[0])  # type: ignore[index]


def test_a_seeded_teleport_leaves_the_global_random_state_alone() -> None:
    problem = case("rescaling").problem()
    before = torch.get_rng_state()
    mt.teleport(problem.model, mt.RandomTeleporter(seed=0), problem.inputs, None, problem.symmetries)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_ascent_steps_reach_higher_and_descent_goes_down() -> None:
    def reached(**settings: Any) -> float:
        problem = case("linear pair").problem()
        teleporter = mt.GradientAscentTeleporter(**settings)
        report = mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)
        return report.gradient_norm_after / report.gradient_norm_before

    few, many = reached(steps=2, step_size=0.05), reached(steps=6, step_size=0.05)
    assert 1 < few < many
    assert reached(steps=2, step_size=0.02, direction="descent") < 1
    capped = reached(steps=6, step_size=0.05, cap=0.05)
    assert 1 < capped < many


def test_an_objective_of_ones_own_is_followed() -> None:
    class SmallSecondLayer(Objective):
        def evaluations(self, symmetry: mt.Symmetry, point: Point) -> float:
            return 0.0

        def __call__(self, point: Point) -> Tensor:
            return -point.parameters["2.weight"].square().sum()

    problem = case("rescaling").problem()
    before = float(problem.model[2].weight.detach().square().sum())  # type: ignore[index]
    teleporter = mt.GradientAscentTeleporter(SmallSecondLayer(), steps=3)
    mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)
    assert float(problem.model[2].weight.detach().square().sum()) < before  # type: ignore[index]


def covariances(problem: Any) -> dict[str, Tensor]:
    (symmetry,) = problem.symmetries
    return symmetry.matrices(problem.point())


@pytest.mark.parametrize(
    ("name", "side", "white"),
    [
        ("2022 form, samples at width", "features", "feature_covariance"),
        ("2024 form, samples at width", "features", "preactivation_covariance"),
        ("rescaling", "features", "feature_covariance"),
        ("rescaling, convolution to linear", "features", "feature_covariance"),
        ("rescaling", "outgoing", "outgoing_covariance"),
    ],
)
def test_whitening_makes_white(name: str, side: Any, white: str) -> None:
    problem = case(name).problem()
    mt.teleport(problem.model, mt.WhiteningTeleporter(side), problem.inputs, None, problem.symmetries)
    covariance = covariances(problem)[white]
    if problem.symmetries[0].group.name == "diagonal":
        covariance = torch.diag(torch.diagonal(covariance))
    assert relative(covariance, torch.eye(len(covariance), dtype=torch.float64)) <= 1e-6


def test_whitening_does_not_stretch_what_is_not_there() -> None:
    problem = case("2022 form").problem()
    report = mt.teleport(problem.model, mt.WhiteningTeleporter(), problem.inputs, None, problem.symmetries)
    values = torch.linalg.eigvalsh(covariances(problem)["feature_covariance"])
    assert values.tolist() == pytest.approx([0, 1, 1, 1, 1], abs=1e-6)
    assert report.size < 20, "the fifth direction has no features and would be stretched by 1e6"


def bottleneck() -> tuple[nn.Module, Tensor, list[mt.Symmetry]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([[10.0], [1.0], [0.1]]))
    return model, torch.randn(9, 6, dtype=torch.float64), [mt.LinearPair(model, "0", "1")]


def test_balanced_factors_have_equal_covariances() -> None:
    model, inputs, symmetries = bottleneck()
    mt.teleport(model, mt.WhiteningTeleporter("balanced", damping=1e-13), inputs, None, symmetries)
    v, u = (value.detach() for value in model.parameters())
    assert relative(v @ v.mT, u.mT @ u) <= 1e-9


def test_alternating_whitens_one_side_and_then_the_other() -> None:
    model, inputs, symmetries = bottleneck()
    teleporter = mt.WhiteningTeleporter("alternating")
    one = torch.eye(3, dtype=torch.float64)
    state = None
    point = point_of(model, symmetries, (inputs,), None, lambda out: out.square().sum())[0]
    for name in ("feature_covariance", "outgoing_covariance", "feature_covariance"):
        point, _, state = travel(teleporter, point, symmetries, state)
        assert relative(symmetries[0].matrices(point)[name], one) <= 1e-8


def test_whitening_in_float32() -> None:
    model, inputs, symmetries = bottleneck()
    model, inputs = model.float(), inputs.float()
    report = mt.teleport(model, mt.WhiteningTeleporter(), inputs, None, symmetries)
    assert report.accepted
    assert report.drift < 1e-4
    features = model[0](inputs).detach()
    assert relative(features.mT @ features, torch.eye(3)) <= 1e-2


def test_a_point_where_the_objective_is_flat_stays() -> None:
    problem = case("linear pair").problem()
    problem.targets = (problem.outputs(),)
    before = snapshot(problem.model)
    report = mt.teleport(
        problem.model, mt.GradientAscentTeleporter(), problem.inputs, problem.loss_of, problem.symmetries
    )
    assert report.accepted
    assert report.size == 0
    assert untouched(problem.model, before)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: mt.RandomTeleporter(size=-1.0), "Frobenius norm"),
        (lambda: mt.RandomTeleporter(size=float("nan")), "Frobenius norm"),
        (lambda: mt.RandomTeleporter(seed=0, generator=torch.Generator()), "not both"),
        (lambda: mt.GradientAscentTeleporter(steps=0), "at least one step"),
        (lambda: mt.GradientAscentTeleporter(cap=0.0), "has to be positive"),
        (lambda: mt.GradientAscentTeleporter(cap=float("nan")), "has to be positive"),
        (lambda: mt.WhiteningTeleporter("gradients"), "one of features, outgoing, balanced, alternating"),  # type: ignore[arg-type]
        (lambda: mt.WhiteningTeleporter(damping=-1.0), "at least zero"),
        (lambda: mt.WhiteningTeleporter(damping=float("nan")), "at least zero"),
    ],
)
def test_settings_that_cannot_work_are_refused(build: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()


# Ways to call it.


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x + shift)))


def test_inputs_as_tensor_tuple_and_dict() -> None:
    x, shift = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    results = []
    for inputs in ((x, shift), [x, shift], {"shift": shift, "x": x}):
        torch.manual_seed(0)
        model = TwoInputs().double()
        outputs = model(x, shift).detach()
        symmetries = [mt.Rescaling(model, "first", "second")]
        report = mt.teleport(model, mt.RandomTeleporter(seed=0), inputs, None, symmetries)
        assert report.accepted
        assert relative(model(x, shift), outputs) <= 1e-12
        results.append(model.first.weight.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_symmetries_of_a_sequential_are_found() -> None:
    problem = case("chain of rescalings").problem()
    report = mt.teleport(problem.model, mt.RandomTeleporter(seed=0), problem.inputs[0])
    assert report.accepted
    assert len(report.sizes) == 2
    assert math.isnan(report.loss_before)
    assert math.isnan(report.loss_after)
    assert math.isnan(report.gradient_norm_before)


def test_models_without_symmetries_are_told_how_to_name_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(Unsuitable, match=r"Sequential.*symmetries=\[metateleport.Rescaling\(model, first, second\)"):
        mt.teleport(model, mt.RandomTeleporter(seed=0), torch.ones(2, 3))
    with pytest.raises(ValueError, match="no symmetry to move along"):
        mt.teleport(model, mt.RandomTeleporter(seed=0), torch.ones(2, 3), symmetries=[])
    assert untouched(model, before)


def test_a_teleporter_that_looks_at_gradients_asks_for_a_loss() -> None:
    problem = case("rescaling").problem()
    with pytest.raises(ValueError, match="pass loss="):
        mt.teleport(problem.model, mt.GradientAscentTeleporter(), problem.inputs, None, problem.symmetries)
    with pytest.raises(ValueError, match="needs gradients"):
        travel(mt.GradientAscentTeleporter(), problem.point().replace(gradients={}), problem.symmetries)


@pytest.mark.parametrize("seed", [0, None])
def test_in_training_mode_dropout_and_normalisation_do_not_matter(seed: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2), nn.Dropout(0.2)
    ).double()
    before = snapshot(model)
    x = torch.randn(9, 3, dtype=torch.float64)
    report = mt.teleport(model, mt.RandomTeleporter(seed=seed), x, lambda out: out.square().sum())
    assert report.accepted
    assert report.drift <= 1e-12
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-12)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])


def test_a_frozen_layer_elsewhere_is_no_hindrance() -> None:
    problem = case("chain of rescalings").problem()
    problem.model[0].requires_grad_(False)  # type: ignore[index]
    outputs = problem.outputs()
    report = mt.teleport(problem.model, mt.GradientAscentTeleporter(), problem.inputs, problem.loss_of)
    parameters = [value for value in problem.model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(problem.loss_of(problem.model(*problem.inputs)), parameters)
    assert report.accepted
    assert relative(problem.outputs(), outputs) <= 1e-12
    assert report.gradient_norm_after == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trust_region_bounds_the_condition_by_half_the_digits(dtype: torch.dtype) -> None:
    assert TrustRegion().condition_for(dtype) == pytest.approx(torch.finfo(dtype).eps ** -0.5)
    assert TrustRegion(max_condition=7.0).condition_for(dtype) == 7


def test_float32_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = snapshot(model)
    teleporter = Fixed(lambda symmetry, _: 60 * torch.ones(symmetry.group.shape), trust_region=TrustRegion(1e3))
    report = mt.teleport(model, teleporter, torch.ones(3, 2), symmetries=[mt.LinearPair(model, "0", "1")])
    assert not report.accepted
    assert "condition number" in report.reason
    assert untouched(model, before)
