"""Every teleporter on every kind of symmetry, alone and in stacks: what moves, and what is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from symmetry_cases import CASES, Case, assert_close, case, meeting, relative
from teleporter_cases import TASKS, TELEPORTERS, snapshot, untouched
from torch import Tensor

import metateleport as mt
from metateleport.capture import point_of
from metateleport.objectives import SquaredGradientNorm
from metateleport.teleporters import travel


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
