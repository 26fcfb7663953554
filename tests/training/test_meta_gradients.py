"""Meta-gradients against central differences: over one step, over five with nothing detached, and as trained."""

from __future__ import annotations

import itertools

import pytest
import torch
from gradient_cases import (
    MODES,
    TOLERANCE,
    analytic,
    attached,
    compare,
    error,
    every_problem,
    gauged,
    meta_optimizer,
    plain,
    recorded,
    stack,
    unrolled,
)

from metateleport.training import StackOptimizer
from metateleport.training.differentiable import _Bounded, unroll_context


@every_problem
def test_over_one_step(mode: str, kind: str) -> None:
    meta, problem = meta_optimizer(mode), stack(kind)
    if meta.config.teleports and meta.config.steps:
        # The step is chosen by what is seen after the teleport.
        attached(meta)
    assert compare(meta, problem, 1, plain(meta, problem, 1)) < TOLERANCE


@every_problem
def test_over_five_steps_with_nothing_detached(mode: str, kind: str) -> None:
    meta, problem = attached(meta_optimizer(mode)), stack(kind)
    assert compare(meta, problem, 5, plain(meta, problem, 5)) < TOLERANCE


@every_problem
def test_over_five_steps_at_recorded_basis_and_features(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, problem = meta_optimizer(mode), stack(kind)
    gradient = analytic(meta, problem, 5)
    evaluate = recorded(meta, problem, 5, monkeypatch)
    assert error(gradient, evaluate, meta) < TOLERANCE


@pytest.mark.parametrize("secants", [0, 3])
@pytest.mark.parametrize("kind", ["linear pair", "rescaling"])
def test_over_five_steps_in_learned_gauges(kind: str, secants: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, problem = gauged(secants), stack(kind)
    gradient = analytic(meta, problem, 5)
    named = dict(zip((name for name, _ in meta.named_parameters()), gradient, strict=True))
    assert float(named["gauge.networks.GL.head.weight"].norm()) > 1e-3
    evaluate = recorded(meta, problem, 5, monkeypatch)
    assert error(gradient, evaluate, meta) < TOLERANCE


@pytest.mark.parametrize("base", ["sgd", "momentum", "adam"])
def test_through_the_moments_of_every_base_optimizer(base: str) -> None:
    meta, problem = attached(meta_optimizer("tele", base)), stack("linear pair")
    assert compare(meta, problem, 3, plain(meta, problem, 3)) < TOLERANCE


def test_differences_notice_what_is_detached() -> None:
    """Five steps as trained, against plain differences: the part through basis and features is missing."""
    meta, problem = meta_optimizer("lr+tele"), stack("linear pair")
    assert compare(meta, problem, 5, plain(meta, problem, 5)) > 1e-4


def test_what_a_step_can_say_is_bounded_task_by_task() -> None:
    before = (torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))
    after = tuple((value + 1).requires_grad_() for value in before)
    passed = _Bounded.apply(*before, *after)
    for third in (float("nan"), 2.0):
        says = torch.tensor([1.0, 1e6, third, -1e9], dtype=torch.float64)
        for value in after:
            value.grad = None
        torch.autograd.backward(passed, [says.unsqueeze(1).expand_as(value) for value in passed], retain_graph=True)
        total = sum(value.grad.sum(1) for value in after)
        assert total[0] == 3.0
        assert total[1] == pytest.approx(100.0)
        assert total[2] == (6.0 if third == 2.0 else 0.0)
        assert total[3] == pytest.approx(-100.0)
    # What cancels between tensors, as along an orbit, is let through as it is.
    for value in after:
        value.grad = None
    opposed = [torch.full((4, 2), 1e6, dtype=torch.float64), torch.full((4, 1), -2e6, dtype=torch.float64)]
    torch.autograd.backward(_Bounded.apply(*before, *after), opposed)
    assert all(torch.equal(value.grad, each) for value, each in zip(after, opposed, strict=True))


@pytest.mark.parametrize("mapped", [False, True])
def test_gradients_of_a_step_are_taken_in_no_leaf(mapped: bool) -> None:
    """To find a leaf, autograd walks through the graph of all steps before, so that each step would cost more."""
    meta, (model, batch) = meta_optimizer("lr"), stack("rescaling")
    if mapped:
        model.__dict__["_chain"] = None
    with unroll_context(model, StackOptimizer(model, meta)) as (patched, differentiable):
        differentiable.step(patched(batch, probe=True))
        seen = patched(batch, probe=True)
    targets = [*seen.parameters.values(), *seen.probes.values()]
    assert len(targets) >= 6
    assert all(each.grad_fn is not None for each in targets)


def test_first_order_leaves_the_derivative_of_gradients_out() -> None:
    meta, problem = meta_optimizer("lr"), stack("linear pair")
    model, batch = problem
    gradients = []
    for first_order in (False, True):
        optimizer = StackOptimizer(model, meta)
        optimizer.first_order = first_order
        with unroll_context(model, optimizer) as (patched, differentiable):
            seen, losses = patched(batch, probe=True), []
            for _ in range(3):
                differentiable.step(seen)
                seen = patched(batch, probe=True)
                losses.append(seen.losses)
        found = torch.autograd.grad(torch.stack(losses).log().mean(), list(meta.rule.parameters()))
        gradients.append(torch.cat([each.flatten() for each in found]))
    exact, cheap = gradients
    assert not torch.allclose(exact, cheap, rtol=1e-3)
    assert float(exact @ cheap) > 0


def test_all_networks_learn() -> None:
    for mode, kind in itertools.product(MODES, ["linear pair", "rescaling"]):
        meta, problem = meta_optimizer(mode), stack(kind)
        loss, _ = unrolled(meta, problem, 2, track=True)
        loss.backward()
        group = "GL" if kind == "linear pair" else "diagonal"
        for name, parameter in meta.named_parameters():
            if "networks" in name and f"networks.{group}." not in name:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None, (mode, name)
                assert parameter.grad.isfinite().all()
