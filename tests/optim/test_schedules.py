"""When a teleporting optimizer teleports, and that a schedule goes on from a state dict."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symmetry_cases import Problem, case

import metateleport as mt
from metateleport.optim import AtSteps, Every, Schedule, WhenStalled
from metateleport.optim.schedules import Calling
from metateleport.teleporters import TrustRegion


def wrap(problem: Problem, lr: float = 1e-4, **keywords: Any) -> mt.TeleportingOptimizer:
    inner = torch.optim.SGD(problem.model.parameters(), lr=lr, momentum=0.5)
    return mt.TeleportingOptimizer(
        inner, problem.model, mt.RandomTeleporter(0.3, seed=0), problem.symmetries, **keywords
    )


def train(problem: Problem, optimizer: mt.TeleportingOptimizer, steps: int) -> list[int]:
    """The numbers of the steps before which it teleported."""
    found = []
    for _ in range(steps):
        before, number = len(optimizer.reports), optimizer.steps
        optimizer.zero_grad()
        problem.loss_of(problem.model(*problem.inputs)).backward()
        optimizer.step()
        found += [number] * (len(optimizer.reports) - before)
    return found


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, [0, 10, 20]),
        ({"every": 7}, [0, 7, 14, 21]),
        ({"schedule": Every(7, start=3)}, [3, 10, 17, 24]),
        ({"schedule": AtSteps([4, 0, 22, 99])}, [0, 4, 22]),
        ({"schedule": lambda step: step in (1, 2, 4, 8, 16)}, [1, 2, 4, 8, 16]),
    ],
)
def test_it_teleports_before_the_steps_that_are_named(keywords: dict[str, Any], expected: list[int]) -> None:
    problem = case("linear pair").problem()
    assert train(problem, wrap(problem, **keywords), 25) == expected


def test_a_function_is_asked_once_for_each_step() -> None:
    problem, asked = case("linear pair").problem(), []
    train(problem, wrap(problem, schedule=lambda step: bool(asked.append(step))), 5)
    assert asked == [0, 1, 2, 3, 4, 5]


def norms_of(schedule: WhenStalled, norms: list[float]) -> list[int]:
    """Steps at which the schedule was due, each taken as a teleport."""
    due = []
    for step, norm in enumerate(norms):
        now = schedule.due(step)
        due += [step] * now
        schedule.observe(step, norm, teleported=now)
    return due


def test_a_norm_that_falls_fast_enough_is_let_be() -> None:
    falling = [0.9**step for step in range(100)]
    # The later four of eight steps stand four steps after the earlier ones.
    edge = 1 - 0.9**4
    assert norms_of(WhenStalled(window=8, threshold=edge - 1e-9), falling) == []
    assert norms_of(WhenStalled(window=8, threshold=edge + 1e-9), falling)[0] == 8


# A busy machine draws slowly.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 12), st.integers(0, 30), st.lists(st.floats(0.1, 10.0), min_size=80, max_size=80))
def test_a_teleport_comes_again_after_the_window_and_the_cooldown(
    window: int, cooldown: int, norms: list[float]
) -> None:
    due = norms_of(WhenStalled(window, threshold=0.5, cooldown=cooldown), norms)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert all(gap >= max(window, cooldown) for gap in gaps)
    constant = norms_of(WhenStalled(window, threshold=0.5, cooldown=cooldown), [1.0] * 80)
    assert constant == list(range(window, 80, max(window, cooldown)))


def test_the_scale_of_the_loss_does_not_matter() -> None:
    norms = (torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5).tolist()
    found = norms_of(WhenStalled(window=6, threshold=0.1), norms)
    assert found
    assert found == norms_of(WhenStalled(window=6, threshold=0.1), [2.0**-30 * norm for norm in norms])


def test_it_is_told_the_norm_of_the_gradient_that_was_stepped_with() -> None:
    told: list[tuple[int, float, bool]] = []

    class Telling(Schedule):
        needs_gradient_norm = True

        def due(self, step: int) -> bool:
            return step == 1

        def observe(self, step: int, gradient_norm: float, teleported: bool) -> None:
            told.append((step, gradient_norm, teleported))

    problem = case("linear pair").problem()
    optimizer = wrap(problem, schedule=Telling())
    for step in range(3):
        train(problem, optimizer, 1)
        norm = torch.cat([each.grad.flatten() for each in problem.model.parameters() if each.grad is not None]).norm()
        assert told[-1] == (step, pytest.approx(float(norm)), step == 1)
    assert optimizer.last_report is not None
    assert told[1][1] == pytest.approx(optimizer.last_report.gradient_norm_after)


def test_a_stalled_run_teleports_and_a_running_one_does_not() -> None:
    for lr, expected in ((0.0, [5, 10, 15]), (3e-3, [])):
        problem = case("linear pair").problem()
        schedule = WhenStalled(window=5, threshold=0.01)
        assert train(problem, wrap(problem, lr=lr, schedule=schedule), 17) == expected


def test_a_refused_teleport_is_not_proposed_at_every_step() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, lr=0.0, schedule=WhenStalled(window=5))
    optimizer.teleporter.trust_region = TrustRegion(max_size=0.1)
    assert train(problem, optimizer, 17) == [5, 10, 15]
    assert not any(report.accepted for report in optimizer.reports)


@pytest.mark.parametrize("make", [lambda: WhenStalled(6, 0.3, cooldown=9), lambda: Every(4, start=3)])
@pytest.mark.parametrize("at", [3, 8, 14])
def test_a_run_that_goes_on_teleports_at_the_same_steps(make: Callable[[], Schedule], at: int) -> None:
    problem, resumed = case("linear pair").problem(), case("linear pair").problem()
    optimizer = wrap(problem, schedule=make())
    train(problem, optimizer, at)
    file = io.BytesIO()
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = train(problem, optimizer, 30)
    other = wrap(resumed, schedule=make())
    # What it saw before it was loaded is forgotten.
    train(resumed, other, 2)
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert train(resumed, other, 30) == expected
    assert expected
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(problem.model.parameters(), resumed.model.parameters(), strict=True)
    )


def test_from_the_state_of_the_bare_optimizer_a_schedule_starts_anew() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, lr=0.0, schedule=WhenStalled(window=5))
    train(problem, optimizer, 4)
    optimizer.load_state_dict(optimizer.optimizer.state_dict())
    assert train(problem, optimizer, 7) == [5]


def test_the_state_of_another_schedule_is_refused_before_anything_is_loaded() -> None:
    problem = case("linear pair").problem()
    stalled = wrap(problem, schedule=WhenStalled(window=5))
    every = wrap(problem, every=3)
    train(problem, stalled, 2)
    with pytest.raises(ValueError, match="it is another schedule's"):
        every.load_state_dict(stalled.state_dict())
    with pytest.raises(ValueError, match="saved with another schedule"):
        stalled.load_state_dict(every.state_dict())
    assert stalled.steps == 2


def test_a_norm_that_is_not_finite_is_passed_over() -> None:
    norms: list[float] = [float("nan"), 1.0, float("inf"), 1.0, 1.0, 1.0]
    assert norms_of(WhenStalled(window=3), norms) == [5]


def test_a_copied_optimizer_has_a_schedule_of_its_own() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, lr=0.0, schedule=WhenStalled(window=5))
    train(problem, optimizer, 3)
    model, twin = copy.deepcopy((problem.model, optimizer))
    copied = Problem(model, problem.inputs, problem.targets, problem.loss, problem.symmetries)
    assert train(copied, twin, 4) == [5]
    assert train(problem, optimizer, 4) == [5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(0), "at least 1, not 0"),
        (lambda: Every(True), "at least 1, not True"),
        (lambda: Every(3, start=-1), "at least 0, not -1"),
        (lambda: AtSteps([]), r"at least 0, not \[\]"),
        (lambda: AtSteps([3, 1.5]), "at least 0, not 1.5"),
        (lambda: WhenStalled(window=1), "at least 2, not 1"),
        (lambda: WhenStalled(cooldown=-1), "at least 0, not -1"),
        (lambda: WhenStalled(threshold=1.0), "lies below 1, it is 1.0"),
        (lambda: WhenStalled(threshold=float("nan")), "lies below 1, it is nan"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_and_a_schedule_together_are_refused() -> None:
    problem = case("linear pair").problem()
    with pytest.raises(ValueError, match=r"give every=5 or schedule=Every\(3\), not both"):
        wrap(problem, every=5, schedule=Every(3))
    with pytest.raises(TypeError, match=r"is a metateleport.optim.Schedule or a function of the step, not 5"):
        wrap(problem, schedule=5)


def test_they_say_what_they_are() -> None:
    def now(step: int) -> bool:
        return step == 0

    given_schedules = (Every(3), Every(3, start=2), AtSteps([2, 1]), WhenStalled(5, 0.1), Calling(now))
    assert [repr(each) for each in given_schedules] == [
        "Every(3)",
        "Every(3, start=2)",
        "AtSteps([1, 2])",
        "WhenStalled(window=5, threshold=0.1, cooldown=0)",
        "Calling(now)",
    ]


def test_a_step_without_gradients_has_no_norm() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, schedule=WhenStalled(window=5))
    train(problem, optimizer, 1)
    optimizer.zero_grad()
    optimizer.step()
    assert len(optimizer.schedule.state_dict()["norms"]) == 1
