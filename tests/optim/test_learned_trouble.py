"""What the learned optimizer does where something is wrong: it skips, takes back, goes without, and says so once."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from learned_cases import backward, loss_of, meta_of, mlp, teleporting, weights
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import PassRecorder
from metateleport.learned import MetaOptimizer

RULES = [{}, {"mode": "lr"}]


def made(model: nn.Module, meta: MetaOptimizer, **settings: Any) -> mt.LearnedOptimizer:
    return mt.LearnedOptimizer(model, meta, [mt.Rescaling(model, "0", "2")], **settings)


def said(caught: list[warnings.WarningMessage], words: str) -> int:
    return sum(words in str(each.message) for each in caught)


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_is_left_out_counted_and_said_once(
    where: str, bad: float, config: dict[str, Any]
) -> None:
    model, other = mlp(), mlp()
    optimizer, clean = made(model, meta_of(**config)), made(other, meta_of(**config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            if number < 2:
                loss = backward(model, 50 + number)
                if where == "gradient":
                    model[2].bias.grad[0] = bad
                before = weights(model)
                optimizer.step(loss=loss * bad if where == "loss" else None)
                assert torch.equal(weights(model), before)
            for each, taken in ((model, optimizer), (other, clean)):
                backward(each, number)
                taken.step()
    # Nothing of it is remembered.
    assert torch.equal(weights(model), weights(other))
    assert (optimizer.skipped, clean.skipped) == (2, 0)
    assert (optimizer.steps, clean.steps) == (3, 3)
    assert said(caught, "that step was left out, and is counted in `skipped`") == 1


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_steps_left_out_before_the_first_one_taken_are_saved() -> None:
    model = mlp(torch.float32)
    optimizer, again = made(model, meta_of()), made(model, meta_of())
    backward(model, 0)
    optimizer.step(loss=float("nan"))
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped == 1
    backward(model, 0)
    again.step()
    assert (again.steps, again.skipped) == (1, 1)


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("config", [*RULES, {"mode": "update", "update": "adaptive"}])
def test_a_gradient_too_large_to_be_squared_leaves_no_trace(config: dict[str, Any]) -> None:
    model, other = mlp(torch.float32), mlp(torch.float32)
    optimizer, clean = made(model, meta_of(**config)), made(other, meta_of(**config))
    for number in range(4):
        if number == 2:
            backward(model, 50)
            # A running mean of squares that is infinite once is so for ever.
            model[0].weight.grad[0, 0] = 1e20
            optimizer.step()
        for each, taken in ((model, optimizer), (other, clean)):
            backward(each, number)
            taken.step()
    assert torch.equal(weights(model), weights(other))
    assert optimizer.skipped == 1


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("config", RULES)
def test_a_step_that_led_to_a_loss_that_is_not_finite_is_taken_back_and_damped(config: dict[str, Any]) -> None:
    model = mlp()
    optimizer = made(model, meta_of(**config))
    start = weights(model)
    optimizer.step(loss=backward(model))
    assert not torch.equal(weights(model), start)
    after = weights(model)
    backward(model)
    optimizer.step(loss=torch.tensor(math.nan))
    # One batch may be to blame by itself.
    assert torch.equal(weights(model), after)
    backward(model)
    optimizer.step(loss=torch.tensor(math.nan))
    assert torch.equal(weights(model), start)
    assert optimizer.loop.state is not None
    assert float(optimizer.loop.state.progress.damping) == pytest.approx(0.3)
    assert optimizer.skipped == 2


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_every_second_batch_that_is_not_finite_undoes_nothing() -> None:
    with_them, without = mlp(), mlp()
    spoilt, clean = made(with_them, meta_of()), made(without, meta_of())
    for _ in range(5):
        clean.step(loss=backward(without))
        spoilt.step(loss=backward(with_them))
        backward(with_them)
        spoilt.step(loss=torch.tensor(math.nan))
    assert torch.equal(weights(with_them), weights(without))
    assert (spoilt.steps, spoilt.skipped) == (5, 5)


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_a_step_that_was_taken_back_leaves_frozen_weights_alone() -> None:
    model = mlp()
    optimizer = made(model, meta_of())
    optimizer.step(loss=backward(model))
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.clone()
    moved = model[2].weight.clone()
    for _ in range(2):
        backward(model)
        optimizer.step(loss=math.nan)
    assert torch.equal(model[0].weight, kept)
    assert not torch.equal(model[2].weight, moved)


def test_a_worse_loss_is_taken_back_where_it_is_told_and_not_where_it_is_not() -> None:
    for tell in (True, False):
        model = mlp()
        optimizer = made(model, meta_of(mode="lr"), deterministic=True)
        start = weights(model)
        optimizer.step(loss=backward(model) if tell else None)
        first = weights(model) - start
        worse = 100 * backward(model)
        optimizer.step(loss=worse if tell else None)
        assert optimizer.last_step is not None
        assert bool(optimizer.last_step.accepted) != tell
        if tell:
            # The same step from the same start, damped.
            torch.testing.assert_close(weights(model) - start, 0.3 * first, rtol=0.3, atol=1e-3)


def test_a_step_that_would_put_a_nan_into_a_weight_is_left_out_and_counted() -> None:
    model, meta = mlp(), meta_of()
    optimizer = made(model, meta)
    step = meta.rule.step

    def spoilt(*given: Any) -> Any:
        moved, state = step(*given)
        return {**moved, "2.bias": moved["2.bias"] * math.nan}, state

    before = weights(model)
    meta.rule.step = spoilt  # type: ignore[method-assign]
    backward(model)
    with pytest.warns(UserWarning, match="a learned step was not finite"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    assert optimizer.skipped == 1
    meta.rule.step = step  # type: ignore[method-assign]
    backward(model)
    optimizer.step()
    assert not torch.equal(weights(model), before)


@pytest.mark.filterwarnings("ignore:.*not made for this")
@pytest.mark.parametrize("config", [*RULES, {"mode": "update", "update": "coordinate"}, {"update": "tensor"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_zero_does_not_hold_up_the_others(dtype: torch.dtype, config: dict[str, Any]) -> None:
    model = mlp(dtype)
    optimizer = mt.LearnedOptimizer(model, meta_of(**config), [])
    before = [value.detach().clone() for value in model.parameters()]
    for number in range(3):
        backward(model, number)
        model[2].weight.grad.zero_()
        optimizer.step()
    moved = [not torch.equal(value, start) for value, start in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, True]
    assert optimizer.skipped == 0


def test_without_gradients_nothing_happens() -> None:
    model = mlp()
    optimizer = made(model, meta_of())
    before = weights(model)
    assert optimizer.step() is None
    assert optimizer.step(loss=2.0) == 2.0
    assert torch.equal(weights(model), before)
    assert (optimizer.steps, optimizer.skipped, optimizer.last_step) == (0, 0, None)


# --- what a pass does not tell ---------------------------------------------------------------------------------------


def test_a_step_without_evidence_makes_no_teleport_and_says_so_once() -> None:
    model = mlp()
    optimizer = made(model, teleporting())
    sizes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for passes in (1, 2, 3, 1):
            optimizer.zero_grad()
            for number in range(passes):
                loss_of(model, number).backward()
            before = weights(model)
            optimizer.step()
            assert not torch.equal(weights(model), before)
            assert optimizer.last_step is not None
            sizes.append(float(optimizer.last_step.size))
    assert [size > 0 for size in sizes] == [True, False, False, True]
    assert said(caught, "no recorded pass agrees with the gradients") == 1


@pytest.mark.parametrize("how", ["frozen", "not held by this optimizer"])
def test_a_symmetry_that_cannot_be_moved_along_is_named_once(how: str) -> None:
    model = mlp()
    optimizer, words = made(model, teleporting()), f"'0.bias' is {how}"
    if how == "frozen":
        model[0].bias.requires_grad_(False)
    else:
        held = [value for name, value in model.named_parameters() if name != "0.bias"]
        optimizer.param_groups[0]["params"] = held
    kept = model[0].bias.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            backward(model, number)
            optimizer.step()
            assert optimizer.last_step is not None
            assert float(optimizer.last_step.size) == 0
    assert said(caught, words) == 1
    assert torch.equal(model[0].bias, kept)


def test_the_recorded_pass_is_forgotten_after_each_step_and_before_each_closure() -> None:
    model = mlp()
    optimizer = made(model, teleporting())
    recorder = optimizer._recorder
    assert isinstance(recorder, PassRecorder)
    backward(model, 0)
    reached = []

    def closure() -> Tensor:
        loss = backward(model, 1)
        reached.append(recorder.reached)
        return loss

    optimizer.step(closure)
    # The pass of before belongs to no closure.
    assert reached == [1]
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.size) > 0
    assert recorder.last is None
    backward(model, 2)
    optimizer._step = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        optimizer.step()
    assert recorder.last is None


# --- replicas --------------------------------------------------------------------------------------------------------


def test_replicas_read_no_loss_and_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever each rank saw of its own data: equal gradients make equal steps."""

    def run(seen: int, tell: bool, replicas: bool) -> tuple[Tensor, mt.LearnedOptimizer]:
        monkeypatch.setattr("metateleport.optim.learned.replicated", lambda: replicas)
        model = mlp()
        optimizer = made(model, teleporting(mode="lr+tele", gauge="exact"))
        for number in range(3):
            backward(model, number)
            gradients = [value.grad for value in model.parameters()]
            loss = backward(model, 30 * seen + number)
            for value, gradient in zip(model.parameters(), gradients, strict=True):
                value.grad = gradient
            optimizer.step(loss=loss if tell else None)
        return weights(model), optimizer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, optimizer = run(0, True, replicas=True)
    assert said(caught, "where several processes train together") == 1
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.size) == 0
    assert not optimizer.last_step.gauges
    assert optimizer.loop.state is not None
    assert not optimizer.loop.state.progress.known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(1, True, replicas=True)[0], first)
        assert torch.equal(run(2, False, replicas=True)[0], first)
        assert not torch.equal(run(1, True, replicas=False)[0], run(0, True, replicas=False)[0])


def test_one_replica_s_loss_that_is_not_finite_skips_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metateleport.optim.learned.replicated", lambda: True)
    model = mlp()
    optimizer = mt.LearnedOptimizer(model, meta_of())
    backward(model)
    optimizer.step(loss=math.nan)
    assert (optimizer.steps, optimizer.skipped) == (1, 0)
