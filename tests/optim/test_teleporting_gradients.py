"""Gradients that a teleport between backward and step carries along: summed, clipped, scaled, in half precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from symmetry_cases import Problem, assert_close, case
from teleporting_cases import (
    PROBLEMS,
    TELEPORTERS,
    backward,
    closure_of,
    each_problem,
    everything,
    fresh_gradients,
    frozen_steps,
    gradients,
    loss_at,
    same,
    train,
    wrap,
)
from torch import Tensor, nn

import metateleport as mt
from metateleport.learned import LearnedTeleporter


@pytest.mark.parametrize("name", [*PROBLEMS, "2024 form", "chain of 2022 forms", "mixed chain", "quadratic"])
@pytest.mark.parametrize("with_closure", [True, False])
def test_carried_gradients_are_those_at_the_moved_weights(name: str, with_closure: bool) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, frozen_steps(problem), mt.RandomTeleporter(size=0.5, seed=3), max_stretch=100.0)
    before, loss = copy.deepcopy(problem.model.state_dict()), loss_at(problem)
    if with_closure:
        optimizer.step(closure_of(problem, optimizer))
    else:
        backward(problem, optimizer)
        optimizer.step()
    report = optimizer.last_report
    assert report is not None
    assert report.accepted, report.reason
    assert any(not torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    assert loss_at(problem) == pytest.approx(loss, rel=1e-9)
    assert_close(gradients(problem.model), fresh_gradients(problem), 1e-9)
    fresh = math.sqrt(sum(float(value.square().sum()) for value in fresh_gradients(problem).values()))
    assert report.gradient_norm_after == pytest.approx(fresh)
    assert math.isnan(report.loss_before) is not with_closure
    if with_closure:
        assert report.loss_before == pytest.approx(loss)


@each_problem
@pytest.mark.parametrize("teleporter", TELEPORTERS)
def test_with_and_without_a_closure_the_steps_are_the_same(name: str, teleporter: str) -> None:
    one, other = case(name).problem(), case(name).problem()
    mine = train(one, wrap(one, "momentum", TELEPORTERS[teleporter](), every=3), 8)
    theirs = train(other, wrap(other, "momentum", TELEPORTERS[teleporter](), every=3), 8, closure=False)
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_a_learned_teleporter_moves_and_remembers() -> None:
    problem = case("linear pair").problem()
    teleporter = LearnedTeleporter(hidden=4)
    optimizer = wrap(problem, "momentum", teleporter, every=2, max_stretch=None)
    train(problem, optimizer, 3)
    packed = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    expected = train(problem, optimizer, 4)
    assert all(report.size > 0 for report in optimizer.reports)
    problem.model.load_state_dict(packed[0])
    resumed = wrap(problem, "momentum", teleporter, every=2, max_stretch=None)
    resumed.load_state_dict(packed[1])
    assert all(torch.equal(*pair) for pair in zip(train(problem, resumed, 4), expected, strict=True))
    # Forgetting shows.
    problem.model.load_state_dict(packed[0])
    packed[1]["teleporting"]["state"] = None
    resumed.load_state_dict(packed[1])
    assert not torch.equal(train(problem, resumed, 4)[-1], expected[-1])


def test_evaluations_count_the_drift_and_what_is_rebuilt() -> None:
    linear = case("linear pair").problem()
    optimizer = wrap(linear)
    optimizer.step(closure_of(linear, optimizer))
    assert optimizer.last_report is not None
    assert optimizer.last_report.evaluations == pytest.approx(1 / 3)
    chain = case("chain of 2022 forms").problem()
    optimizer = wrap(chain)
    forwards: list[int] = []
    chain.model[0].register_forward_hook(lambda *_: forwards.append(1))  # type: ignore[index]
    optimizer.step(closure_of(chain, optimizer))
    point = chain.point()
    rebuilt = sum(symmetry.rebuild_cost(point) for symmetry in chain.symmetries)
    # One pass for the drift, one for the graph that the caller's backward pass has freed; and the closure's own.
    assert optimizer.last_report is not None
    assert optimizer.last_report.evaluations == pytest.approx(rebuilt + 2 / 3)
    assert len(forwards) == 3 + 1


def test_a_gradient_summed_over_batches_is_carried_by_exact_symmetries() -> None:
    for name in ("linear pair", "rescaling"):
        problem = case(name).problem()
        optimizer = wrap(problem, frozen_steps(problem))
        other = case(name).fresh_inputs()

        def total(problem: Problem = problem, other: tuple[Tensor, ...] = other) -> None:
            problem.model.zero_grad()
            for inputs in (other, problem.inputs):
                problem.loss_of(problem.model(*inputs)).backward()

        total()
        optimizer.step()
        carried = gradients(problem.model)
        assert optimizer.last_report is not None
        assert optimizer.last_report.size > 0
        total()
        assert_close(carried, gradients(problem.model), 1e-10)


def test_a_gradient_summed_over_batches_is_refused_by_batch_pairs() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem, frozen_steps(problem))
    for inputs in (case("2022 form").fresh_inputs(), problem.inputs):
        problem.loss_of(problem.model(*inputs)).backward()
    before = everything(problem, optimizer)
    optimizer.step()
    assert same(before, everything(problem, optimizer))
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert "no multiple of the last pass's" in optimizer.last_report.reason


@each_problem
def test_a_clipped_gradient_is_carried_clipped(name: str) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, frozen_steps(problem))
    backward(problem, optimizer)
    norm = float(nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1))
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    fresh = {key: 0.1 / norm * value for key, value in fresh_gradients(problem).items()}
    assert_close(gradients(problem.model), fresh, 1e-5)


@each_problem
def test_a_scaler_of_gradients_works(name: str) -> None:
    problem, plain = case(name).problem(), case(name).problem()
    optimizer, reference = wrap(problem, "momentum"), wrap(plain, "momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(problem.loss_of(problem.model(*problem.inputs))).backward()
        scaler.step(optimizer)
        scaler.update()
    train(plain, reference, 12, closure=False)
    assert_close(dict(problem.model.named_parameters()), dict(plain.model.named_parameters()), 1e-8)
    assert [r.size for r in optimizer.reports] == pytest.approx([0.5, 0.5])
    assert loss_at(problem) < loss_at(case(name).problem())


def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(problem.model.state_dict())
    scaler.scale(problem.loss_of(problem.model(*problem.inputs))).backward()
    next(problem.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps == 0
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())


def test_autocast_teleports_within_its_rounding() -> None:
    problem = case("rescaling").problem()
    model, inputs, targets = problem.model.float(), problem.inputs[0].float(), problem.targets[0].float()
    optimizer = wrap(problem, frozen_steps(problem), mt.RandomTeleporter(size=0.3, seed=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(inputs)
    assert out.dtype == torch.bfloat16
    (out.float() - targets).square().sum().backward()
    optimizer.step()
    report = optimizer.last_report
    assert report is not None
    assert report.accepted, report.reason
    assert 0 < report.drift < 1e-2
