"""What every method is charged is what it evaluates, counted where the tasks' loss is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learned_cases import shape_of
from torch import Tensor, nn

import metateleport as mt
from metateleport.evaluation import (
    BASELINES,
    REFERENCES,
    Method,
    trajectory,
)
from metateleport.evaluation.methods import (
    first_order,
    gauss_newton,
    gradient_ascent,
    lbfgs,
    learned,
    scheduled,
    whitening,
)
from metateleport.evaluation.methods.learned import Learned
from metateleport.families import TaskStack
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.symmetries import BatchPair2022
from metateleport.teleporters import travel

BUDGET, TASKS = 12, 2


@dataclasses.dataclass
class Counted:
    """Calls of the loss of a stack: in a graph those of gradients, without one those of losses alone."""

    gradients: int = 0
    losses: int = 0

    def __deepcopy__(self, memo: Any) -> Counted:
        return self

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.gradients += 1
        else:
            self.losses += 1
        # A method that is not charged would go on for ever.
        assert self.gradients + self.losses < 50 * BUDGET * TASKS, "evaluations that nothing was charged for"
        return (outputs - targets).square().sum() / 2


class Silent(trajectory.Recorder):
    """A recorder that evaluates nothing to report."""

    made: list[Silent] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made.append(self)

    def _measure(self, parameters: Any) -> dict[str, Any]:
        return {"loss": np.ones(len(self.stack))}

    def drift(self, *arguments: Any, **keywords: Any) -> Tensor:
        return torch.zeros(len(self.stack))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[Silent]:
    for module in (learned, first_order, gradient_ascent, lbfgs, gauss_newton, scheduled, whitening):
        monkeypatch.setattr(module, "Recorder", Silent)
    monkeypatch.setattr(Silent, "made", [])
    return Silent.made


def stack_of(
    counted: Counted, samples: int = 5, batch: int | None = None, between: type[nn.Module] = nn.LeakyReLU
) -> TaskStack:
    source = torch.Generator().manual_seed(3)
    tasks = []
    for number in range(TASKS):
        model = nn.Sequential(nn.Linear(5, 5, bias=False), between(), nn.Linear(5, 5, bias=False)).double()
        x, y = (torch.randn(samples, 5, generator=source).double() for _ in range(2))
        pair = mt.LinearPair(model, "0", "2") if between is nn.Identity else BatchPair2022(model, "0", "2", model[1])
        tasks.append(mt.Task(model, counted.loss, (x,), (y,), symmetries=[pair], batch_size=batch, seed=number))
    return TaskStack(tasks)


def charged(method: Method, stack: TaskStack, silent: list[Silent]) -> Tensor:
    method.run(stack, BUDGET)
    return silent[-1].spent


def meta(**changes: Any) -> MetaOptimizer:
    torch.manual_seed(5)
    return MetaOptimizer(shape_of(mode="lr+tele", hidden=4, groups=("GL",), **changes))


@pytest.mark.parametrize("batch", [None, 2])
def test_a_learned_step_is_charged_one_evaluation_and_what_its_teleport_rebuilds(
    batch: int | None, silent: list[Silent], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, extra = Counted(), torch.zeros(TASKS, dtype=torch.float64)
    stack, step = stack_of(counted, batch=batch), MetaOptimizer.step

    def noted(self: MetaOptimizer, *arguments: Any, **keywords: Any) -> Any:
        taken = step(self, *arguments, **keywords)
        extra.add_(taken.evaluations)
        return taken

    monkeypatch.setattr(MetaOptimizer, "step", noted)
    found = charged(Learned("learned", meta()), stack, silent)
    assert bool((extra > 0).all()), "a teleport along a batch-exact symmetry rebuilds part of the backward pass"
    torch.testing.assert_close(found, counted.gradients + extra)
    assert float(found.max()) < BUDGET + 2


@pytest.mark.parametrize("batch", [None, 2])
def test_a_learned_step_is_credited_once_the_evaluation_at_it_is_paid_for(
    batch: int | None, silent: list[Silent], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, paid, told = stack_of(Counted(), batch=batch), [], []
    record, loop = Silent.record, learned.InnerLoop

    def noted(self: Silent, parameters: Any, *rest: Any) -> None:
        paid.append({name: value.clone() for name, value in parameters.items()})
        record(self, parameters, *rest)

    def made(*given: Any, **named: Any) -> Any:
        told.append(given[2])
        return loop(*given, **named)

    monkeypatch.setattr(Silent, "record", noted)
    monkeypatch.setattr(learned, "InnerLoop", made)
    evaluated: list[dict[str, Tensor]] = []
    point_at = stack.point_at

    def seen(parameters: Any, *rest: Any) -> Any:
        evaluated.append({name: value.detach().clone() for name, value in parameters.items()})
        return point_at(parameters, *rest)

    monkeypatch.setattr(stack, "point_at", seen)
    charged(Learned("learned", meta()), stack, silent)
    assert len(paid) == len(evaluated) > 3
    for number, parameters in enumerate(paid):
        before = evaluated[: number + 1]
        for task in range(TASKS):
            own = {name: value[task] for name, value in parameters.items()}
            assert any(all(torch.equal(value, each[name][task]) for name, value in own.items()) for each in before)
    # Whether losses of two steps may be compared is the tasks' matter.
    assert told == [batch is None]


def test_a_gauge_is_free_and_an_off_teleport_costs_nothing(silent: list[Silent]) -> None:
    for method in (
        Learned("learned", meta(stays=False, gauge="exact")),
        Learned("learned/teleport-off", meta(), "off"),
    ):
        counted = Counted()
        found = charged(method, stack_of(counted, between=nn.Identity), silent)
        assert found.tolist() == [counted.gradients] * TASKS == [BUDGET] * TASKS


def test_a_random_element_is_charged_as_the_learned_one(silent: list[Silent]) -> None:
    counted = Counted()
    charged(Learned("learned/random-teleport", meta(), "random"), stack_of(counted), silent)
    # Two runs: the learned one's sizes are seen first.
    assert len(silent) == 2
    assert all(float(each.spent.min()) > BUDGET - 2 for each in silent)


FIRST_ORDER: dict[str, Callable[[], Method]] = {
    "gd": lambda: BASELINES["gd"].make(lr=1e-3),
    "momentum": lambda: BASELINES["momentum"].make(lr=1e-3),
    "adam": lambda: BASELINES["adam"].make(lr=1e-3),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_methods_are_charged_one_evaluation_a_step(name: str, silent: list[Silent]) -> None:
    counted = Counted()
    found = charged(FIRST_ORDER[name](), stack_of(counted), silent)
    assert found.tolist() == [counted.gradients] * TASKS == [BUDGET] * TASKS


def test_soap_is_charged_one_evaluation_a_step(silent: list[Silent]) -> None:
    counted = Counted()
    found = charged(REFERENCES["soap"].make(lr=1e-3), stack_of(counted), silent)
    assert found.tolist() == [counted.gradients] * TASKS == [BUDGET] * TASKS


def test_lbfgs_is_charged_all_that_its_line_search_evaluates(silent: list[Silent]) -> None:
    counted = Counted()
    found = charged(BASELINES["lbfgs"].make(), stack_of(counted, samples=20), silent)
    assert float(found.sum()) == counted.gradients
    assert float(found.min()) >= BUDGET


def test_gauss_newton_is_charged_its_jacobians_and_a_third_a_trial(
    silent: list[Silent], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, fresh = Counted(), torch.zeros(TASKS, dtype=torch.float64)
    stack, at = stack_of(counted, samples=20), gauss_newton._System.at
    trials: list[int] = []
    losses_at = type(stack).losses_at

    def noted(*arguments: Any) -> Any:
        fresh.add_(arguments[3])
        return at(*arguments)

    def tried(*arguments: Any) -> Tensor:
        trials.append(1)
        return losses_at(*arguments)

    price = gauss_newton.jacobian_cost(stack, stack.tensors(), stack.full)
    monkeypatch.setattr(gauss_newton._System, "at", noted)
    monkeypatch.setattr(type(stack), "losses_at", tried)
    found = charged(REFERENCES["gauss-newton"].make(), stack, silent)
    assert price > 1
    torch.testing.assert_close(found, price * fresh + len(trials) / 3)


@pytest.mark.parametrize("module", [gradient_ascent, whitening])
@pytest.mark.parametrize("samples", [5, 4])
def test_teleporting_baselines_are_charged_what_their_moves_evaluate(
    module: Any, samples: int, silent: list[Silent], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, extra = Counted(), torch.zeros(TASKS, dtype=torch.float64)

    def noted(*arguments: Any, **keywords: Any) -> Any:
        before = counted.gradients
        arrived, moves, state = travel(*arguments, **keywords)
        extra.add_(sum(move.evaluations for move in moves))
        # What a teleporter evaluates by itself is in its moves.
        counted.gradients = before
        return arrived, moves, state

    monkeypatch.setattr(module, "travel", noted)
    made = BASELINES["gradient-ascent"] if module is gradient_ascent else BASELINES["whitening"]
    keywords = {"schedule": "before every 10th step"} if module is gradient_ascent else {"variant": "features"}
    found = charged(made.make(lr=1e-3, **keywords), stack_of(counted, samples=samples), silent)
    assert bool((extra > 0).all())
    torch.testing.assert_close(found, counted.gradients + extra)
