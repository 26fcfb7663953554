"""Teleports that are refused: nothing moves, no other task is stopped, and the report says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_cases import CASES, Case, case, relative
from teleporter_cases import TASKS, TELEPORTERS, Make, snapshot, untouched
from torch import Tensor, nn

import metateleport as mt
from metateleport.point import Point
from metateleport.symmetries import BatchPair2022, BatchPair2024
from metateleport.teleporters import TrustRegion, travel

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
