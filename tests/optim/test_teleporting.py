"""Any optimizer with teleports in between: without them bit for bit itself, with them the loss stays."""

from __future__ import annotations

import pytest
import torch
from symmetry_cases import case
from teleporting_cases import INNER, TELEPORTERS, each_problem, loss_at, train, wrap

import metateleport as mt

each_inner = pytest.mark.parametrize("inner", INNER)


@each_problem
@each_inner
def test_without_teleports_it_is_the_inner_optimizer_bit_for_bit(name: str, inner: str) -> None:
    problem, bare = case(name).problem(), case(name).problem()
    optimizer = wrap(problem, inner, mt.NoTeleport(), every=7)
    reference = INNER[inner](bare.model.parameters())
    for mine, theirs in zip(train(problem, optimizer, 60), train(bare, reference, 60), strict=True):
        assert torch.equal(mine, theirs)
    assert len(optimizer.reports) == 9
    assert {(r.accepted, r.size, r.drift, r.evaluations) for r in optimizer.reports} == {(True, 0.0, 0.0, 0.0)}


@each_problem
@each_inner
@pytest.mark.parametrize("teleporter", TELEPORTERS)
@pytest.mark.filterwarnings("ignore:the state")
def test_teleports_keep_the_loss_and_training_stays_finite(name: str, inner: str, teleporter: str) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, inner, TELEPORTERS[teleporter](), every=20)
    start = loss_at(problem)
    for values in train(problem, optimizer, 200):
        assert bool(values.isfinite().all())
    moved = [report for report in optimizer.reports if report.size > 0]
    assert len(optimizer.reports) == 10
    assert len(moved) >= 9
    assert max(report.drift for report in moved) < 1e-9
    for report in moved:
        assert report.loss_after == pytest.approx(report.loss_before, rel=1e-9)
    assert loss_at(problem) < start
