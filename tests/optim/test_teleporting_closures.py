"""Teleports in steps that are given a closure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_cases import case
from teleporting_cases import INNER, closure_of, frozen_steps, loss_at, wrap
from torch import Tensor

import metateleport as mt
from metateleport.point import Point


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_closure_is_evaluated_once_a_step_and_its_loss_returned(inner: str) -> None:
    problem = case("linear pair").problem()
    optimizer, calls = wrap(problem, inner, every=2), []
    for step in range(4):
        loss = optimizer.step(closure_of(problem, optimizer, calls))
        assert len(calls) == step + 1
        assert float(loss.detach()) == calls[-1]


def test_lbfgs_starts_from_the_known_evaluation() -> None:
    problem, bare = case("linear pair").problem(), case("linear pair").problem()
    calls: list[float] = []
    theirs: list[float] = []
    optimizer = wrap(problem, "lbfgs", every=1)
    optimizer.step(closure_of(problem, optimizer, calls))
    reference = INNER["lbfgs"](bare.model.parameters())
    reference.step(closure_of(bare, reference, theirs))
    assert len(calls) == len(theirs)


def test_a_closure_is_asked_again_once_the_weights_have_changed() -> None:
    """As optimizers do that perturb the weights before they look at the loss."""

    class Perturbing(torch.optim.SGD):
        seen: list[float] = []

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for value in group["params"]:
                        value.add_(0.1)
            with torch.enable_grad():
                self.seen.append(float(closure().detach()))
            return self.seen[-1]

    problem = case("linear pair").problem()
    optimizer = wrap(problem, Perturbing(problem.model.parameters(), lr=0.0))
    optimizer.step(closure_of(problem, optimizer))
    assert Perturbing.seen == [pytest.approx(loss_at(problem))]


def test_the_loss_after_is_told_to_first_order() -> None:
    """A symmetry that does not quite hold: the predicted change is the real one, up to the square of the drift."""

    class Loose(mt.Rescaling):
        def act(self, element: Tensor, point: Point) -> Point:
            moved = super().act(element, point)
            return moved.update({self.first_weight: moved.parameters[self.first_weight] * (1 + 1e-5)})

    problem = case("rescaling").problem()
    optimizer = wrap(problem, frozen_steps(problem), symmetries=[Loose(problem.model, "0", "2")])
    optimizer.step(closure_of(problem, optimizer))
    report = optimizer.last_report
    assert report is not None
    assert report.loss_after - report.loss_before == pytest.approx(loss_at(problem) - report.loss_before, rel=1e-3)
    assert report.loss_after != report.loss_before
