"""Failures of a teleport show in the optimizer's reports, and only then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from symmetry_cases import Problem, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.optim import AtSteps, Every
from metateleport.optim.judge import Judge, slope
from metateleport.point import Point
from metateleport.teleporters import TrustRegion
from metateleport.teleporters.failures import NO_GAIN, UNSTABLE, WORSE_HELD_OUT


class Pushing(mt.Teleporter):
    name = "pushing"

    def __init__(self, given: Tensor, **region: Any) -> None:
        super().__init__(TrustRegion(**region))
        self.given = given

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        return self.given.to(point.parameters[symmetry.parameters[0]].dtype), state


def wrap(problem: Problem, teleporter: mt.Teleporter, lr: float = 1e-3, **keywords: Any) -> mt.TeleportingOptimizer:
    inner = torch.optim.SGD(problem.model.parameters(), lr=lr)
    keywords.setdefault("schedule", AtSteps([12]))
    return mt.TeleportingOptimizer(inner, problem.model, teleporter, problem.symmetries, **keywords)


def train(problem: Problem, optimizer: Any, steps: int, loss: Callable[[Tensor], Tensor] | None = None) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (loss or problem.loss_of)(problem.model(*problem.inputs))
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)


def report_of(optimizer: mt.TeleportingOptimizer) -> mt.TeleportReport:
    assert optimizer.last_report is not None
    return optimizer.last_report


# --- no gain -----------------------------------------------------------------------------------------------------


def test_a_slower_descent_shows_once_the_window_is_over_and_a_faster_one_does_not() -> None:
    for direction, failed in (("ascent", False), ("descent", True)):
        problem = case("rescaling").problem()
        teleporter = mt.GradientAscentTeleporter(steps=5, step_size=0.2, direction=direction)
        optimizer = wrap(problem, teleporter)
        train(problem, optimizer, 22)
        assert report_of(optimizer).accepted
        assert report_of(optimizer).failures == {}
        # The loss of the tenth step after the teleport is that from which the eleventh starts.
        train(problem, optimizer, 1)
        assert (NO_GAIN in report_of(optimizer).failures) is failed
        if failed:
            assert report_of(optimizer).gradient_norm_after < report_of(optimizer).gradient_norm_before
            assert "log of the loss changed by" in report_of(optimizer).failures[NO_GAIN]


def test_a_loss_that_is_no_longer_finite_is_no_gain() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), schedule=AtSteps([0]), window=5)
    train(problem, optimizer, 3)
    train(problem, optimizer, 3, lambda out: out.sum() * math.nan)
    assert "was not finite" in report_of(optimizer).failures[NO_GAIN]


def test_at_the_first_step_a_loss_that_does_not_fall_is_no_gain() -> None:
    for lr, failed in ((0.0, True), (1e-3, False)):
        problem = case("rescaling").problem()
        optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), lr=lr, schedule=AtSteps([0]), window=5)
        train(problem, optimizer, 6)
        assert (NO_GAIN in report_of(optimizer).failures) is failed


def test_the_next_teleport_ends_the_window() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), lr=0.0, schedule=AtSteps([6, 12]))
    train(problem, optimizer, 13)
    first, second = optimizer.reports
    assert NO_GAIN in first.failures
    assert second.failures == {}


def test_without_a_loss_or_with_too_few_nothing_is_said() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), lr=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        problem.loss_of(problem.model(*problem.inputs)).backward()
        optimizer.step()
    assert report_of(optimizer).failures == {}
    optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), lr=0.0, schedule=Every(2))
    train(problem, optimizer, 9)
    assert all(report.failures == {} for report in optimizer.reports)


def test_a_loss_below_zero_is_compared_without_logs() -> None:
    for after, failed in (([-1.0, -3.0, -5.0, -7.0, -9.0], False), ([-1.0, -1.1, -1.2, -1.3, -1.4], True)):
        judge, report = Judge(4), nothing()
        for value in (4.0, 3.0, 2.0, 1.0, 0.0):
            judge.see(torch.tensor(value))
        judge.start()
        for value in after:
            judge.see(torch.tensor(value))
        assert judge.ripe
        found = judge.verdict(report, lambda: math.nan).failures
        assert (NO_GAIN in found) is failed
        assert not judge.waiting


def test_steady_linear_convergence_is_neither_gain_nor_slowing() -> None:
    """In logs it is a straight line, so that a faster rate is seen although the loss falls by less."""
    for rate, failed in ((0.8, False), (0.95, True)):
        judge, loss = Judge(10), 1.0
        for _ in range(11):
            judge.see(torch.tensor(loss, dtype=torch.float64))
            loss *= 0.9
        judge.start()
        for _ in range(11):
            judge.see(torch.tensor(loss, dtype=torch.float64))
            loss *= rate
        assert (NO_GAIN in judge.verdict(nothing(), lambda: math.nan).failures) is failed


def nothing() -> mt.TeleportReport:
    return mt.TeleportReport("none", True, "", 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, (0.0,), 0.0, 0.0)


def test_a_slope_is_that_of_a_line() -> None:
    assert slope([1.0 + 0.25 * step for step in range(7)]) == pytest.approx(0.25)
    assert slope([2.0, 2.0, 2.0]) == 0.0


# --- held-out loss -----------------------------------------------------------------------------------------------


def scripted(*values: float) -> tuple[Callable[[], float], list[float]]:
    left: Iterator[float] = iter(values)
    told: list[float] = []

    def held_out() -> float:
        told.append(next(left))
        return told[-1]

    return held_out, told


def test_a_batch_pair_that_harms_other_data_is_seen_at_once() -> None:
    problem = case("2022 form").problem()
    others = [torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)]

    def held_out() -> Tensor:
        assert not torch.is_grad_enabled()
        return problem.loss(problem.model(others[0]), others[1])

    optimizer = wrap(problem, mt.RandomTeleporter(4.0, seed=0), lr=0.0, schedule=AtSteps([0]), held_out=held_out)
    before = float(held_out_free(held_out))
    train(problem, optimizer, 1)
    report = report_of(optimizer)
    assert report.drift < 1e-9
    assert report.held_out_before == pytest.approx(before)
    assert report.held_out_after == pytest.approx(float(held_out_free(held_out)))
    assert report.held_out_after > 1.001 * before
    assert "right after it" in report.failures[WORSE_HELD_OUT]


def held_out_free(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def test_an_exact_teleport_leaves_the_held_out_loss_and_later_steps_may_raise_it() -> None:
    for later, failed in ((1.0, False), (1.0005, False), (1.1, True), (0.5, False)):
        problem = case("rescaling").problem()
        held_out, told = scripted(1.0, 1.0, later)
        optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), schedule=AtSteps([1]), held_out=held_out)
        train(problem, optimizer, 2)
        assert len(told) == 2
        assert WORSE_HELD_OUT not in report_of(optimizer).failures
        train(problem, optimizer, 10)
        assert len(told) == 3
        assert (WORSE_HELD_OUT in report_of(optimizer).failures) is failed
        train(problem, optimizer, 30)
        assert len(told) == 3


def test_a_refused_teleport_harms_nobody() -> None:
    problem = case("rescaling").problem()
    held_out, told = scripted(1.0, 5.0)
    teleporter = mt.RandomTeleporter(0.1, seed=0, trust_region=TrustRegion(max_drift=0.0))
    optimizer = wrap(problem, teleporter, schedule=AtSteps([0]), held_out=held_out)
    train(problem, optimizer, 1)
    report = report_of(optimizer)
    assert not report.accepted
    assert report.held_out_before == report.held_out_after == 1.0
    assert told == [1.0]


def test_held_out_data_disturb_neither_modes_nor_draws_nor_the_trajectory() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).double()

    inputs = torch.randn(6, 3, dtype=torch.float64)
    ends = []
    for with_held_out in (True, False):
        model = build()
        model[2].eval()

        def held_out(model: nn.Sequential = model) -> float:
            model.train()
            torch.rand(3)
            return float(model(inputs).square().mean())

        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = mt.TeleportingOptimizer(
            inner,
            model,
            mt.RandomTeleporter(0.3, seed=0),
            [mt.Rescaling(model, "0", "3")],
            every=3,
            held_out=held_out if with_held_out else None,
        )
        for _ in range(7):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        assert not model[2].training
        assert model.training
        assert all(report.accepted for report in optimizer.reports)
        ends.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    assert torch.equal(*ends)


# --- unstable elements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generator", "region", "seen"),
    [
        ([3.0, -3.0, 0.0, 0.0], {"max_condition": 10.0}, "condition number is above"),
        ([3.0, -3.0, 0.0, 0.0], {"max_size": 1.0}, "larger than 1"),
        ([math.nan, 0.0, 0.0, 0.0], {}, "generator is not finite"),
        ([800.0, 0.0, 0.0, 0.0], {"max_size": 1e4, "max_condition": math.inf, "max_drift": math.inf}, "be finite"),
        ([0.1, 0.0, 0.0, 0.0], {}, None),
        ([3.0, -3.0, 0.0, 0.0], {}, None),
    ],
)
def test_an_element_that_is_too_much_is_named(
    generator: list[float], region: dict[str, float], seen: str | None
) -> None:
    problem = case("rescaling").problem()
    teleporter = Pushing(torch.tensor(generator, dtype=torch.float64), **region)
    optimizer = wrap(problem, teleporter, schedule=AtSteps([0]))
    train(problem, optimizer, 1)
    report = report_of(optimizer)
    assert (UNSTABLE in report.failures) is (seen is not None)
    assert report.accepted is (seen is None)
    if seen is not None:
        assert seen in report.failures[UNSTABLE]


def test_outputs_that_lose_half_of_their_digits_are_named_in_their_own_precision() -> None:
    generator = torch.diag(torch.tensor([7.0, -7.0, 3.0, -3.0]))
    mixing = torch.linalg.qr(torch.randn(4, 4))[0]
    for dtype, failed in ((torch.float32, True), (torch.float64, False)):
        problem = case("linear pair").problem()
        problem.model.to(dtype)
        problem.inputs, problem.targets = (
            tuple(v.to(dtype) for v in each) for each in (problem.inputs, problem.targets)
        )
        teleporter = Pushing(mixing @ generator @ mixing.mT, max_condition=math.inf, max_drift=math.inf)
        optimizer = wrap(problem, teleporter, lr=0.0, schedule=AtSteps([0]), max_stretch=None)
        train(problem, optimizer, 1)
        assert report_of(optimizer).accepted
        assert (UNSTABLE in report_of(optimizer).failures) is failed
        if failed:
            assert "more than half of their digits" in report_of(optimizer).failures[UNSTABLE]


def test_a_rank_condition_that_fails_is_no_instability() -> None:
    problem = case("2022 form").problem()
    (inputs,) = problem.inputs
    problem.inputs = (inputs[[0, 0, 1, 1]],)
    optimizer = wrap(problem, mt.RandomTeleporter(0.3, seed=0), schedule=AtSteps([0]))
    train(problem, optimizer, 1)
    assert not report_of(optimizer).accepted
    assert "condition of the batch pair" in report_of(optimizer).reason
    assert UNSTABLE not in report_of(optimizer).failures


def test_bad_input_is_named() -> None:
    problem = case("rescaling").problem()
    with pytest.raises(TypeError, match="held_out is a function that returns the loss on held-out data, not a float"):
        wrap(problem, mt.NoTeleport(), held_out=1.0)
    for window in (0, 1.5, True):
        with pytest.raises(ValueError, match="window is a number of steps"):
            wrap(problem, mt.NoTeleport(), window=window)
