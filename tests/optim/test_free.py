"""Teleporters that evaluate the loss at other weights, between two steps: with symmetries and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_cases import Problem, assert_close, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.objectives import Sharpness
from metateleport.optim import AtSteps
from metateleport.teleporters import LevelSetTeleporter, NullSpaceTeleporter, TrustRegion

FREE: dict[str, Callable[[], mt.Teleporter]] = {
    "level set": lambda: LevelSetTeleporter(steps=3, step_size=0.02, projections=5, tolerance=1e-13),
    "null space": lambda: NullSpaceTeleporter(steps=3, step_size=0.02),
}
# More units than samples in every layer, so that the null space has room.
NAME = "2024 form"

each_free = pytest.mark.parametrize("teleporter", FREE.values(), ids=FREE)


def sharpness() -> mt.Teleporter:
    objective = Sharpness(radii=(0.1,), directions=2)
    return mt.GradientAscentTeleporter(objective, steps=2, step_size=0.05, direction="descent")


def wrap(problem: Problem, teleporter: mt.Teleporter, inner: Any = None, **keywords: Any) -> mt.TeleportingOptimizer:
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.0) if inner is None else inner
    return mt.TeleportingOptimizer(inner, problem.model, teleporter, **keywords)


def closure_of(problem: Problem, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(problem.model(*problem.inputs))
        loss.backward()
        return loss

    return closure


def step(problem: Problem, optimizer: Any) -> mt.TeleportReport:
    optimizer.step(closure_of(problem, optimizer), loss=problem.loss_of)
    return optimizer.last_report


def everything(problem: Problem) -> dict[str, Tensor]:
    kept = {name: value.detach().clone() for name, value in problem.model.state_dict().items()}
    return kept | {f"{n}.grad": p.grad.clone() for n, p in problem.model.named_parameters() if p.grad is not None}


def fresh_gradients(problem: Problem) -> dict[str, Tensor]:
    loss, named = problem.loss_of(problem.model(*problem.inputs)), dict(problem.model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def gradients(problem: Problem) -> dict[str, Tensor]:
    return {name: value.grad for name, value in problem.model.named_parameters() if value.grad is not None}


def loss_at(problem: Problem) -> float:
    return float(problem.loss_of(problem.outputs()))


# --- where it leads ----------------------------------------------------------------------------------------------


@each_free
@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_it_moves_and_the_step_starts_from_the_gradient_there(
    teleporter: Callable[[], mt.Teleporter], with_closure: bool, factor: float
) -> None:
    problem, chosen = case(NAME).problem(), teleporter()
    optimizer, before, loss = wrap(problem, chosen), everything(problem), loss_at(problem)

    def closure() -> Tensor:
        value = closure_of(problem, optimizer)()
        for parameter in problem.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
        return value

    if with_closure:
        optimizer.step(closure, loss=problem.loss_of)
    else:
        closure()
        optimizer.step(loss=problem.loss_of)
    report = optimizer.last_report
    assert report is not None
    assert report.accepted, report.reason
    assert any(not torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert report.loss_before == pytest.approx(loss, rel=1e-12)
    assert report.loss_after == pytest.approx(loss_at(problem), rel=1e-12)
    assert loss_at(problem) == pytest.approx(loss, rel=1e-9)
    assert report.drift < 1e-9
    assert_close(gradients(problem), {n: factor * v for n, v in fresh_gradients(problem).items()}, 1e-9)
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradients(problem).values()))
    assert report.gradient_norm_after == pytest.approx(norm)
    assert report.gradient_norm_after > report.gradient_norm_before
    assert (report.gradient_norm_after / report.gradient_norm_before) ** 2 - 1 == pytest.approx(report.gain)
    assert len(report.sizes) == 1
    assert report.size == report.sizes[0] > 0
    assert report.seconds > 0
    assert report.failures == {}


def test_it_goes_where_a_single_teleport_goes() -> None:
    for teleporter in FREE.values():
        problem, other = case(NAME).problem(), case(NAME).problem()
        step(problem, wrap(problem, teleporter()))
        mt.teleport(other.model, teleporter(), other.inputs, other.loss_of)
        assert_close(dict(problem.model.named_parameters()), dict(other.model.named_parameters()), 1e-9)


def test_sharpness_is_followed_along_the_symmetries() -> None:
    problem, other = case("rescaling").problem(), case("rescaling").problem()
    report = step(problem, wrap(problem, sharpness(), symmetries=problem.symmetries))
    single = mt.teleport(other.model, sharpness(), other.inputs, other.loss_of, other.symmetries)
    assert report.size > 0
    assert report.gain == pytest.approx(single.gain)
    assert_close(dict(problem.model.named_parameters()), dict(other.model.named_parameters()), 1e-12)
    assert_close(gradients(problem), fresh_gradients(problem), 1e-9)
    assert report.state == "transport"
    # One pass to hold the loss against the closure's, one for the drift.
    (symmetry,) = problem.symmetries
    asked = sharpness().evaluations(symmetry, problem.point()) + sharpness().gain_evaluations(symmetry, problem.point())
    assert report.evaluations == pytest.approx(asked + 2 / 3)


@each_free
def test_evaluations_are_those_that_were_made(teleporter: Callable[[], mt.Teleporter]) -> None:
    problem, chosen = case(NAME).problem(), teleporter()
    optimizer, forwards = wrap(problem, chosen), list[int]()
    problem.model[0].register_forward_hook(lambda *_: forwards.append(1))  # type: ignore[index]
    report = step(problem, optimizer)
    # A Hessian-vector product costs two evaluations and runs the model once; the closure's pass is the step's own, and
    # what the null space keeps is seen in a pass without a backward one.
    products = 3
    alone = int(chosen.keeps == "outputs")
    assert report.evaluations == pytest.approx(len(forwards) - 1 - alone + products + alone / 3)


def test_with_the_symmetries_given_they_are_taken_no_notice_of() -> None:
    ends, example = [], torch.zeros(1, 3, dtype=torch.float64)
    for keywords in ({}, {"symmetries": case(NAME).problem().symmetries}, {"example_input": example}):
        problem = case(NAME).problem()
        optimizer = wrap(problem, FREE["level set"](), **keywords)  # type: ignore[arg-type]
        assert optimizer.symmetries == ()
        step(problem, optimizer)
        ends.append(torch.cat([value.detach().flatten() for value in problem.model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_draws_and_buffers_are_those_of_the_pass_and_are_left_alone() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(5)
        layers = [nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 2)]
        return nn.Sequential(*layers).double()

    inputs, found = torch.randn(6, 4, dtype=torch.float64), []
    for teleporter in (FREE["level set"](), None):
        model = build()
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer: Any = inner if teleporter is None else mt.TeleportingOptimizer(inner, model, teleporter)
        torch.manual_seed(6)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            return loss

        if teleporter is None:
            optimizer.step(closure)
        else:
            optimizer.step(closure, loss=lambda outputs: outputs.square().sum())
            assert optimizer.last_report.size > 0
        found.append((torch.get_rng_state(), model[1].running_mean.clone(), model[1].num_batches_tracked.clone()))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


# --- the state ---------------------------------------------------------------------------------------------------


def momentum(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(problem.model.parameters(), lr=1e-4, momentum=0.9)


@each_free
@pytest.mark.parametrize("state", ["keep", "reset", None])
def test_the_state_stays_or_goes_and_the_report_says_so(
    teleporter: Callable[[], mt.Teleporter], state: str | None
) -> None:
    problem = case(NAME).problem()
    inner = momentum(problem)
    optimizer = wrap(problem, teleporter(), inner, state=state, schedule=AtSteps([2]))
    for _ in range(2):
        optimizer.step(closure_of(problem, optimizer))
    before = {p: (p.detach().clone(), inner.state[p]["momentum_buffer"].clone()) for p in problem.model.parameters()}
    moved: list[bool] = []

    def look(*_: Any) -> None:
        for parameter, (weight, value) in before.items():
            moved.append(not torch.equal(parameter, weight))
            if moved[-1] and state == "reset":
                assert parameter not in inner.state
            else:
                assert torch.equal(inner.state[parameter]["momentum_buffer"], value)

    inner.register_step_pre_hook(look)
    report = step(problem, optimizer)
    assert report.size > 0
    assert report.state == (state or "keep")
    assert report.state_entries == {"momentum_buffer": "reset" if state == "reset" else "kept"}
    assert any(moved)


def test_lbfgs_starts_anew_and_from_the_loss_that_was_reached() -> None:
    problem = case(NAME).problem()
    inner = torch.optim.LBFGS(problem.model.parameters(), lr=0.1, max_iter=2)
    loose = LevelSetTeleporter(steps=3, step_size=0.02, projections=0)
    optimizer = wrap(problem, loose, inner, schedule=AtSteps([3]))
    for _ in range(3):
        optimizer.step(closure_of(problem, optimizer))
    asked: list[float] = []
    step_of = inner.step

    def spy(closure: Callable[[], Any]) -> Any:
        asked.append(float(closure().detach()))
        return step_of(closure)

    inner.step = spy  # type: ignore[method-assign]
    told = optimizer.step(closure_of(problem, optimizer), loss=problem.loss_of)
    report = optimizer.last_report
    assert report is not None
    assert report.state == "reset"
    assert report.loss_after != report.loss_before
    assert asked == [pytest.approx(report.loss_after, rel=1e-12)]
    assert float(told) == pytest.approx(report.loss_after, rel=1e-12)


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(problem: Problem, optimizer: mt.TeleportingOptimizer, seen: str, **keywords: Any) -> mt.TeleportReport:
    before = everything(problem)
    optimizer.step(loss=problem.loss_of, **keywords)
    report, after = optimizer.last_report, everything(problem)
    assert report is not None
    assert not report.accepted
    assert seen in report.reason
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (report.size, report.drift, report.weight_decay_change) == (0, 0, 0)
    assert report.loss_after == report.loss_before or math.isnan(report.loss_before)
    return report


@each_free
def test_gradients_that_are_not_those_of_the_last_pass_are_refused(teleporter: Callable[[], mt.Teleporter]) -> None:
    problem = case(NAME).problem()
    optimizer = wrap(problem, teleporter())
    for inputs in (case(NAME).fresh_inputs(), problem.inputs):
        problem.loss_of(problem.model(*inputs)).backward()
    refused(problem, optimizer, "no multiple of those of loss=")
    problem.model.zero_grad()
    closure_of(problem, optimizer)()
    nn.utils.clip_grad_value_(problem.model.parameters(), 1e-2)
    optimizer = wrap(problem, teleporter())
    problem.loss_of(problem.model(*problem.inputs))
    refused(problem, optimizer, "no multiple of those of loss=")


def test_a_gradient_that_would_stay_behind_is_refused() -> None:
    problem = case(NAME).problem()
    inner = torch.optim.SGD(problem.model[0].parameters(), lr=0.0)  # type: ignore[index]
    optimizer = wrap(problem, FREE["level set"](), inner)
    closure_of(problem, problem.model)()
    refused(problem, optimizer, "the gradient of '2.weight' would stay")
    # Without such a gradient, what the optimizer does not hold stays.
    problem.model.zero_grad()
    for parameter in problem.model[2].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    optimizer, before = wrap(problem, FREE["level set"](), inner), everything(problem)
    closure_of(problem, problem.model)()
    optimizer.step(loss=problem.loss_of)
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    after = problem.model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == {"0.weight", "0.bias"}


@each_free
def test_out_of_its_trust_region_it_stays_bit_for_bit(teleporter: Callable[[], mt.Teleporter]) -> None:
    for region, seen in (
        (TrustRegion(max_size=1e-9), "the displacement is larger than 1e-09"),
        (TrustRegion(max_drift=1e-300), "would change by"),
    ):
        problem, chosen = case(NAME).problem(), teleporter()
        chosen.trust_region = region
        # As it was found, without rounding the loss off at the end.
        vars(chosen).update(projections=0)
        optimizer = wrap(problem, chosen)
        closure_of(problem, optimizer)()
        report = refused(problem, optimizer, seen)
        assert list(report.failures) == ["unstable element"]
        assert seen in report.failures["unstable element"]


# --- the loss as a function --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*FREE.values(), sharpness], ids=[*FREE, "sharpness"])
def test_the_loss_has_to_be_the_closures(make: Callable[[], mt.Teleporter]) -> None:
    problem = case("linear pair").problem()
    optimizer, called = wrap(problem, make(), symmetries=problem.symmetries), list[int]()

    def closure() -> Tensor:
        called.append(1)
        return closure_of(problem, optimizer)()

    before = everything(problem)
    with pytest.raises(ValueError, match=r"evaluates the loss at other weights.*loss=lambda outputs"):
        optimizer.step(closure)
    with pytest.raises(TypeError, match="loss is a function from the model's outputs to the loss, not a float"):
        optimizer.step(closure, loss=1.0)  # type: ignore[arg-type]
    assert not called
    with pytest.raises(ValueError, match=r"loss= gives .* where the closure returned .* after 1 forward passes"):
        optimizer.step(closure, loss=lambda outputs: 1.01 * problem.loss_of(outputs))
    with pytest.raises(ValueError, match=r"loss= has to return a scalar; it returned shape \(4,"):
        optimizer.step(closure, loss=lambda outputs: outputs[:4])
    assert all(torch.equal(value, everything(problem)[name]) for name, value in before.items())
    assert optimizer.steps == 0
    assert step(problem, optimizer).accepted
    # Between teleports nothing is asked for.
    optimizer.step(closure)


def test_a_teleporter_that_does_not_ask_for_it_is_not_given_it() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, mt.RandomTeleporter(0.1, seed=0), symmetries=problem.symmetries)
    optimizer.step(closure_of(problem, optimizer), loss=lambda _: pytest.fail("evaluated"))
    assert optimizer.last_report is not None
    assert optimizer.last_report.evaluations == pytest.approx(1 / 3)


def test_a_state_cannot_be_transported_along_no_symmetry() -> None:
    problem = case(NAME).problem()
    for teleporter in FREE.values():
        with pytest.raises(ValueError, match=r"'transport' is not defined under .*choose 'keep' or 'reset'"):
            wrap(problem, teleporter(), state="transport")


@each_free
def test_a_scaler_and_a_scheduler_hand_the_loss_on(teleporter: Callable[[], mt.Teleporter]) -> None:
    problem = case(NAME).problem()
    optimizer = wrap(problem, teleporter(), momentum(problem), every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(7):
        optimizer.zero_grad()
        scaler.scale(problem.loss_of(problem.model(*problem.inputs))).backward()
        scaler.step(optimizer, loss=problem.loss_of)
        scaler.update()
        schedule.step()
    assert [report.accepted for report in optimizer.reports] == [True] * 3
    assert all(report.size > 0 for report in optimizer.reports)
