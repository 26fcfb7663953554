"""The teleporting optimizer as an optimizer: groups, schedulers, saving, copies, hooks and memory."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_cases import Problem, case
from teleporting_cases import INNER, backward, closure_of, gradients, hooks, train, wrap
from torch import Tensor, nn

import metateleport as mt
from metateleport.optim import TeleportingOptimizer
from metateleport.point import Point


class Counting(mt.Teleporter):
    """Remembers how often it was asked, and moves by it."""

    name = "counting"

    def initial_state(self, point: Point, symmetries: Any) -> Any:
        return {"count": torch.zeros(1, dtype=torch.float64), "pair": (torch.zeros(1), 0)}

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        count = state["count"] + 1
        generator = symmetry.group.random_generator(size=0.1 * float(count), seed=1, dtype=torch.float64)
        assert isinstance(state["pair"], tuple)
        return generator, {**state, "count": count}


def test_it_shares_groups_state_and_defaults() -> None:
    problem = case("linear pair").problem()
    inner = torch.optim.SGD(problem.model[0].parameters(), lr=0.1, momentum=0.9)  # type: ignore[index]
    inner.add_param_group({"params": [problem.model[1].weight]})  # type: ignore[index]
    optimizer = wrap(problem, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    optimizer.add_param_group({"params": problem.model[1].bias, "lr": 0.5})  # type: ignore[index]
    assert inner.param_groups[2]["lr"] == 0.5
    train(problem, optimizer, 2)
    assert optimizer.state is inner.state
    assert len(inner.state) == 4
    optimizer.zero_grad()
    assert not gradients(problem.model)
    with pytest.raises(ValueError, match="not the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_step_hooks_run() -> None:
    problem = case("linear pair").problem()
    optimizer, seen = wrap(problem), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append("inner"))
    optimizer.step(closure_of(problem, optimizer))
    assert seen == ["before", "inner", "after"]


@pytest.mark.parametrize("schedule", ["step", "one-cycle"])
def test_schedulers_of_the_learning_rate_work(schedule: str) -> None:
    def make(optimizer: Any) -> Any:
        if schedule == "step":
            return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10)

    problem, bare = case("linear pair").problem(), case("linear pair").problem()
    optimizer = wrap(problem, "momentum", mt.NoTeleport(), every=2)
    reference = INNER["momentum"](bare.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run, stepper in ((problem, optimizer), (bare, reference)):
            scheduler = make(stepper)
            for _ in range(8):
                train(run, stepper, 1)
                scheduler.step()
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(problem.model.parameters(), bare.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("make", [lambda: mt.RandomTeleporter(0.5, seed=4), Counting], ids=["random", "remembering"])
def test_a_run_that_goes_on_from_a_state_dict_takes_the_same_steps(make: Callable[[], mt.Teleporter]) -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "adam", make(), every=3)
    train(problem, optimizer, 7)
    file = io.BytesIO()
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = train(problem, optimizer, 7)
    resumed = case("linear pair").problem()
    resumed.model.load_state_dict(saved["model"])
    other = wrap(resumed, "adam", make(), every=3)
    other.load_state_dict(saved["optimizer"])
    # Saved again before it was used, nothing is lost.
    other.load_state_dict(other.state_dict())
    for mine, theirs in zip(train(resumed, other, 7), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert [r.size for r in other.reports] == [r.size for r in optimizer.reports][-2:]


def test_state_dicts_go_to_and_from_the_bare_optimizer() -> None:
    problem, bare = case("linear pair").problem(), case("linear pair").problem()
    optimizer, inner = wrap(problem, "adam"), INNER["adam"](bare.model.parameters())
    train(problem, optimizer, 2)
    inner.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.steps == 0
    with pytest.raises(ValueError, match="saved with the teleporter 'random'"):
        wrap(problem, "adam", mt.NoTeleport()).load_state_dict(optimizer.state_dict())


def test_a_saved_state_of_another_shape_is_refused() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "sgd", Counting())
    train(problem, optimizer, 1)
    saved = optimizer.state_dict()
    saved["teleporting"].update(steps=0, state={"count": torch.zeros(3)})
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="does not fit this model"):
        optimizer.step(closure_of(problem, optimizer))


def test_a_copy_goes_on_alike_and_alone() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "adam", every=2)
    train(problem, optimizer, 3)
    model, twin = copy.deepcopy((problem.model, optimizer))
    assert twin.model is model
    copied = Problem(model, problem.inputs, problem.targets, problem.loss, problem.symmetries)
    for mine, theirs in zip(train(copied, twin, 4), train(problem, optimizer, 4), strict=True):
        assert torch.equal(mine, theirs)


def test_hooks_are_removed_and_the_inner_optimizer_goes_on() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem, every=1)
    assert hooks(problem.model) > 0
    train(problem, optimizer, 1)
    optimizer.remove_hooks()
    optimizer.remove_hooks()
    assert hooks(problem.model) == 0
    train(problem, optimizer, 2, closure=False)
    assert len(optimizer.reports) == 1
    assert optimizer.state_dict()["teleporting"]["steps"] == 3


def test_the_model_is_copied_and_saved_with_its_hooks_on() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem, every=1)
    empty, file = io.BytesIO(), io.BytesIO()
    torch.save(problem.model, empty)
    out = problem.model(*problem.inputs)
    torch.save(problem.model, file)
    # Nothing that was caught goes with it.
    assert file.tell() == empty.tell()
    file.seek(0)
    for other in (copy.deepcopy(problem.model), torch.load(file, weights_only=False)):
        assert torch.equal(other(*problem.inputs), out)
    # What copies do is not seen.
    problem.loss_of(out).backward()
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.accepted


def test_old_activations_are_let_go() -> None:
    problem = case("chain of 2022 forms").problem()
    optimizer = wrap(problem, every=2)
    inputs = problem.inputs[0].clone()
    caught: list[weakref.ref[Tensor]] = []
    outputs: list[weakref.ref[Tensor]] = []
    problem.model[2].register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))  # type: ignore[index]
    for _ in range(6):
        optimizer.zero_grad()
        problem.loss_of(problem.model(inputs)).backward()
        last = optimizer._recorder.last  # type: ignore[union-attr]
        if last is not None:
            for run in (run for runs in last.runs.values() for run in runs):
                caught += [weakref.ref(value) for value in (run.input, run.cotangent) if value is not None]
            del last, run
        optimizer.step()
        # By counting references alone, without the collector of cycles.
        gc.disable()
    try:
        assert caught
        assert not any(reference() is not None for reference in caught)
        assert not any(reference() is not None for reference in outputs)
    finally:
        gc.enable()


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem)
    backward(problem, optimizer)
    watch = weakref.ref(optimizer._recorder)  # type: ignore[arg-type]
    del optimizer
    gc.collect()
    assert watch() is None
    problem.model(*problem.inputs)


def test_between_teleports_nothing_is_caught() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, every=3)
    train(problem, optimizer, 1)
    backward(problem, optimizer)
    assert optimizer._recorder is not None
    assert optimizer._recorder.last is None


def test_reports_are_bounded() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem)
    assert optimizer.reports.maxlen == TeleportingOptimizer.REPORTS
    assert optimizer.last_report is None
