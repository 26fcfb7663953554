"""What a person sets of the learned optimizer: the factor on its step, weight decay, the length of a run, groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from learned_cases import backward, loss_of, meta_of, mlp, teleporting, trained, weights
from torch import Tensor, nn

import metateleport as mt
from metateleport.learned import MetaOptimizer
from metateleport.learned.meta_optimizer import Step
from metateleport.point import Point

# One that divides by nothing, and one that bounds its steps and needs a stand-in for the loss.
RULES = [{}, {"mode": "lr"}]


def made(model: nn.Module, meta: MetaOptimizer, **settings: Any) -> mt.LearnedOptimizer:
    return mt.LearnedOptimizer(model, meta, [mt.Rescaling(model, "0", "2")], **settings)


def taken_by(optimizer: mt.LearnedOptimizer) -> list[Step]:
    """The steps of the inner loop from now on, whole: the optimizer keeps no second copy of the weights."""
    advance, taken = optimizer.loop.advance, list[Step]()

    def advanced(*given: Any, **named: Any) -> Step:
        taken.append(advance(*given, **named))
        return taken[-1]

    optimizer.loop.advance = advanced  # type: ignore[method-assign]
    return taken


def first_step(meta: MetaOptimizer, **settings: Any) -> tuple[Tensor, Step]:
    """How far the weights are after one step from where they were, and the step."""
    model = mlp()
    optimizer = made(model, meta, **settings)
    taken = taken_by(optimizer)
    before = weights(model)
    loss = backward(model)
    optimizer.step(loss=loss)
    return weights(model) - before, taken[-1]


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parameters[name].flatten() for name, _ in mlp().named_parameters()])


@pytest.mark.parametrize("config", RULES)
@pytest.mark.parametrize("lr", [0.5, 2.0, 0.0])
def test_lr_is_a_factor_on_the_step(lr: float, config: dict[str, Any]) -> None:
    whole, _ = first_step(meta_of(**config))
    part, _ = first_step(meta_of(**config), lr=lr)
    assert float(whole.norm()) > 0
    torch.testing.assert_close(part, lr * whole)


def test_lr_is_no_factor_on_a_teleport() -> None:
    whole, step = first_step(teleporting())
    part, _ = first_step(teleporting(), lr=0.5)
    teleport = flat(step.teleported) - weights(mlp())
    assert float(teleport.norm()) > 1e-3
    torch.testing.assert_close(part, teleport + 0.5 * (whole - teleport))


def test_at_an_lr_of_zero_nothing_is_teleported_either() -> None:
    moved, step = first_step(teleporting(), lr=0.0)
    assert not bool(moved.any())
    assert float(step.size) == 0


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_weight_decay_takes_its_share_of_the_teleported_weights_off(lr: float) -> None:
    for meta in (meta_of(), teleporting()):
        plain, step = first_step(meta, lr=lr)
        decayed, _ = first_step(meta, lr=lr, weight_decay=0.1)
        torch.testing.assert_close(decayed - plain, -lr * 0.1 * flat(step.teleported))


def test_groups_have_factors_and_decays_of_their_own() -> None:
    def run(first: dict[str, float], last: dict[str, float]) -> tuple[Tensor, Tensor]:
        model = mlp()
        groups = [{"params": list(model[0].parameters()), **first}, {"params": list(model[2].parameters()), **last}]
        optimizer = mt.LearnedOptimizer(groups, meta_of())
        before = [weights(model[0]), weights(model[2])]
        backward(model)
        optimizer.step()
        return weights(model[0]) - before[0], weights(model[2]) - before[1]

    whole = run({}, {})
    part = run({"lr": 0.5}, {"weight_decay": 0.2})
    torch.testing.assert_close(part[0], 0.5 * whole[0])
    torch.testing.assert_close(part[1], whole[1] - 0.2 * weights(mlp()[2]))


def test_the_length_of_a_run_is_half_a_cosine_down_to_zero_and_its_end_is_said_once() -> None:
    model = mlp()
    optimizer = made(model, meta_of(), total_steps=4)
    taken = taken_by(optimizer)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(7):
            before, loss = weights(model), backward(model, number)
            optimizer.step(loss=loss)
            learned = flat(taken[-1].parameters) - flat(taken[-1].teleported)
            found.append(float((weights(model) - before).norm() / learned.norm()))
            assert len(caught) == (number >= 4)
    expected = [0.5 * (1 + math.cos(math.pi * min(1.0, number / 4))) for number in range(7)]
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[4:] == [0.0, 0.0, 0.0]
    assert "all of total_steps=4 are taken" in str(caught[0].message)


def test_a_scheduler_and_the_length_of_a_run_multiply() -> None:
    model, other = mlp(), mlp()
    optimizer = mt.LearnedOptimizer(model, meta_of(), total_steps=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.5, 1.0][step])
    expected = mt.LearnedOptimizer(other, meta_of())
    for lr in (0.5, 0.5):
        expected.param_groups[0]["lr"] = lr
        for each, taken in ((model, optimizer), (other, expected)):
            backward(each)
            taken.step()
        if optimizer.steps < 2:
            scheduler.step()
    torch.testing.assert_close(weights(model), weights(other))


@pytest.mark.filterwarnings("ignore:.*not made for this")
@pytest.mark.parametrize("config", RULES)
def test_a_group_that_is_added_is_stepped_from_then_on(config: dict[str, Any]) -> None:
    model = mlp()
    optimizer = mt.LearnedOptimizer(model[0].parameters(), meta_of(**config))
    list(trained(model, optimizer, 2))
    before = weights(model[2])
    assert torch.equal(before, weights(mlp()[2]))
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    list(trained(model, optimizer, 1))
    assert not torch.equal(before, weights(model[2]))


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", RULES)
@pytest.mark.parametrize("kind", ["tensor", "number"])
def test_a_loss_that_is_told_is_that_of_a_closure(kind: str, config: dict[str, Any]) -> None:
    told, closed = mlp(), mlp()
    first, second = made(told, meta_of(**config)), made(closed, meta_of(**config))
    for number in range(4):
        loss = backward(told, number)
        given = float(loss) if kind == "number" else loss
        assert first.step(loss=given) is given
        value = second.step(lambda number=number: backward(closed, number))
        assert float(value) == float(loss)
        assert torch.equal(weights(told), weights(closed))
    assert first.loop.state is not None
    assert first.loop.state.progress.known
    assert not bool(first.loop.state.progress.start.isinf())


def test_a_loss_that_is_told_is_read() -> None:
    def run(tell: bool) -> Tensor:
        model = mlp()
        optimizer = made(model, meta_of(mode="lr"))
        for number in range(3):
            loss = backward(model, number)
            optimizer.step(loss=loss if tell else None)
        return weights(model)

    assert not torch.allclose(run(True), run(False))


@pytest.mark.filterwarnings("ignore:.*not made for this")
@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_that_were_clipped_make_no_longer_steps(recorded: bool) -> None:
    """A rule that divides by the loss would be told one that the gradients are not of."""

    def run(clip: float) -> Tensor:
        model, meta = mlp(), meta_of(mode="lr")
        optimizer = made(model, meta) if recorded else mt.LearnedOptimizer(model, meta, [])
        before = weights(model)
        loss = backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step(loss=loss)
        return weights(model) - before

    assert float(run(1e-3).norm()) < 0.1 * float(weights(mlp()).norm())
    torch.testing.assert_close(run(1e-3), run(1e-5), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bounded_step_is_at_most_half_of_its_tensor_unless_it_can_be_taken_back_at_once(deterministic: bool) -> None:
    model = mlp()
    optimizer = made(model, meta_of(mode="lr"), deterministic=deterministic)
    before = [value.detach().clone() for value in model.parameters()]
    backward(model)
    step = optimizer.meta.rule.step

    def far(point: Point, *rest: Any) -> Any:
        moved, state = step(point, *rest)
        return {name: value + 100 for name, value in moved.items()}, state

    optimizer.meta.rule.step = far  # type: ignore[method-assign]
    optimizer.step()
    for value, start in zip(model.parameters(), before, strict=True):
        far_off = float((value - start).norm())
        assert far_off > 50 if deterministic else far_off == pytest.approx(0.5 * float(start.norm()))


@pytest.mark.parametrize("config", RULES)
def test_gradients_that_are_kept_and_zeroed_are_as_good_as_new_ones(config: dict[str, Any]) -> None:
    """Where a step is taken back, the gradients of before are needed once more."""

    def run(to_none: bool) -> Tensor:
        model = mlp()
        optimizer = made(model, meta_of(**config), deterministic=True)
        for number, factor in ((0, 1.0), (1, 1e3), (0, 1.0)):
            optimizer.zero_grad(set_to_none=to_none)
            loss = loss_of(model, number)
            loss.backward()
            optimizer.step(loss=factor * loss.detach())
        assert optimizer.loop.state is not None
        assert float(optimizer.loop.state.progress.rejected) >= 1
        return weights(model)

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize("config", RULES)
def test_a_scaled_loss_that_is_not_told_changes_no_step(config: dict[str, Any]) -> None:
    def run(scale: float) -> Tensor:
        model = mlp()
        optimizer = made(model, meta_of(**config))
        for number in range(4):
            optimizer.zero_grad()
            (scale * loss_of(model, number)).backward()
            optimizer.step()
        return weights(model)

    assert not torch.allclose(run(1.0), weights(mlp()), atol=1e-2)
    torch.testing.assert_close(run(1e3), run(1.0), rtol=1e-4, atol=1e-5)


def test_a_learning_rate_in_the_place_of_the_factor_is_told() -> None:
    with pytest.warns(UserWarning, match="lr=0.001 is a factor on the learned step"):
        mt.LearnedOptimizer(nn.Linear(3, 2), lr=1e-3)
