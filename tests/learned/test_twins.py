"""The learned optimizer, its stacked form and its twin for `higher` take the same steps."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from learned_cases import shape_of
from symmetry_cases import Case, assert_close, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.checkpoint import CheckpointError
from metateleport.families import TaskStack
from metateleport.learned import MODES, LearnedTeleporter, MetaOptimizer
from metateleport.learned.rules.step import StepRule
from metateleport.point import Point
from metateleport.symmetries import BatchPair2022, BatchPair2024
from metateleport.training import StackOptimizer
from metateleport.training.differentiable import DifferentiableLearnedOptimizer, unroll_context

CHAINS = ["chain of linear pairs", "chain of rescalings", "chain of 2022 forms", "chain of 2024 forms", "quadratic"]
# As many samples as units in every layer: no covariance is singular, whose logarithm would be that of its rounding.
SQUARE = [
    Case(
        "square chain of linear pairs",
        lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
        mt.symmetries_of,
        (4, 4),
    ),
    Case("square chain of rescalings", lambda: chain(nn.LeakyReLU(0.1)), mt.symmetries_of, (4, 4)),
    Case("square chain of 2022 forms", lambda: chain(nn.LeakyReLU(0.1)), lambda m: pairs(BatchPair2022, m), (4, 4)),
    Case("square chain of 2024 forms", lambda: chain(nn.Tanh()), lambda m: pairs(BatchPair2024, m), (4, 4)),
    case("quadratic"),
]
KINDS = ["equivariant", "flat"]
STEPS = 5


def chain(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 4))


def pairs(kind: type[BatchPair2022 | BatchPair2024], model: nn.Module) -> list[mt.Symmetry]:
    return [kind(model, first, second, model[1]) for first, second in (("0", "2"), ("2", "4"))]  # type: ignore[index]


every_mode = pytest.mark.parametrize("mode", MODES)


def meta_optimizer(mode: str, like: TaskStack | None = None, base: str = "momentum") -> MetaOptimizer:
    """A meta-optimizer that teleports as far as a trained one; flat for the shapes of `like`, where given."""
    torch.manual_seed(1)
    shapes = () if like is None else tuple((name, tuple(value.shape[1:])) for name, value in like.tensors().items())
    meta = MetaOptimizer(shape_of(mode=mode, hidden=6, shapes=shapes, base=base, base_lr=1e-3))
    if isinstance(meta.teleporter, LearnedTeleporter):
        with torch.no_grad():
            for each in meta.teleporter.networks.values():
                each.head.bias[-1] = 0.0
                each.head.weight.copy_((torch.rand(each.head.weight.shape) - 0.5) / 4)
    if isinstance(meta.rule, StepRule):
        with torch.no_grad():
            # Short steps: logs of singular covariances carry rounding noise, which long ones raise to 1e-7.
            meta.rule.head.bias[0] = -3.0
    return meta.double()


def stacked_run(problem: Case, meta: MetaOptimizer, tasks: int, steps: int = STEPS) -> list[dict[str, Tensor]]:
    model, batch = problem.stack(tasks)
    optimizer = StackOptimizer(model, meta)
    course = []
    for _ in range(steps):
        optimizer.step(lambda: model(batch, probe=True))
        course.append({name: value.detach().clone() for name, value in model.tensors().items()})
    return course


def twin_run(problem: Case, meta: MetaOptimizer, tasks: int, track: bool) -> list[dict[str, Tensor]]:
    model, batch = problem.stack(tasks)
    course = []
    with unroll_context(model, StackOptimizer(model, meta), track) as (patched, differentiable):
        assert isinstance(differentiable, DifferentiableLearnedOptimizer)
        for _ in range(STEPS):
            differentiable.step(patched(batch, probe=True))
            course.append({name: value.detach().clone() for name, value in patched.tensors().items()})
    return course


def single_run(
    problem: Case, meta: MetaOptimizer, steps: int = STEPS
) -> tuple[list[dict[str, Tensor]], mt.LearnedOptimizer]:
    own = problem.problem(0)
    optimizer = mt.LearnedOptimizer(own.model, meta, own.symmetries, deterministic=True)
    course = []
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, lambda: own.loss_of(own.model(*own.inputs))))
        course.append({name: value.detach().clone().unsqueeze(0) for name, value in own.model.named_parameters()})
    return course, optimizer


def closure_of(optimizer: torch.optim.Optimizer, evaluate: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = evaluate()
        loss.backward()
        return loss

    return closure


def network_for(kind: str, mode: str, problem: Case, tasks: int) -> MetaOptimizer:
    return meta_optimizer(mode, problem.stack(tasks)[0] if kind == "flat" else None)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@every_mode
def test_the_twin_takes_the_same_steps(mode: str, kind: str, track: bool) -> None:
    problem = case("2022 form, samples at width")
    meta = network_for(kind, mode, problem, 3)
    for ours, theirs in zip(stacked_run(problem, meta, 3), twin_run(problem, meta, 3, track), strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("mode", ["lr+tele", "update+tele"])
def test_the_twin_takes_the_same_steps_on_chains(mode: str, name: str) -> None:
    meta = meta_optimizer(mode)
    for ours, theirs in zip(stacked_run(case(name), meta, 2), twin_run(case(name), meta, 2, True), strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@every_mode
def test_one_model_is_a_stack_of_one(mode: str, kind: str) -> None:
    problem = SQUARE[2]
    meta = network_for(kind, mode, problem, 1)
    course, _ = single_run(problem, meta, steps=3)
    for ours, theirs in zip(course, stacked_run(problem, meta, 1, steps=3), strict=True):
        assert_close(ours, theirs, 1e-7)


@pytest.mark.parametrize("problem", SQUARE, ids=str)
def test_one_model_is_a_stack_of_one_on_chains(problem: Case) -> None:
    """Below the second pair of a chain of batch pairs the backward pass has to be rebuilt."""
    meta = meta_optimizer("lr+tele")
    course, optimizer = single_run(problem, meta, steps=3)
    for ours, theirs in zip(course, stacked_run(problem, meta, 1, steps=3), strict=True):
        assert_close(ours, theirs, 1e-7)
    assert optimizer.last_step is not None
    assert not bool(optimizer.last_step.refused.any())
    assert bool((optimizer.last_step.size > 0).all())


def test_the_rebuilt_part_is_counted() -> None:
    name = "chain of 2022 forms"
    _, optimizer = single_run(case(name), meta_optimizer("lr+tele"), steps=1)
    model, batch = case(name).stack(1)
    stacked = StackOptimizer(model, meta_optimizer("lr+tele"))
    stacked.step(lambda: model(batch, probe=True))
    assert optimizer.last_step is not None
    assert stacked.loop.last_step is not None
    # The graph of the closure is gone: its forward pass is run once more.
    assert float(optimizer.last_step.evaluations - stacked.loop.last_step.evaluations) == pytest.approx(1 / 3)
    _, exact = single_run(case("chain of linear pairs"), meta_optimizer("lr+tele"), steps=1)
    assert exact.last_step is not None
    assert float(exact.last_step.evaluations) == 0


def test_a_stack_goes_back_to_where_it_was() -> None:
    """The point that is remembered is a copy: the parameters are overwritten in place."""
    model, batch = case("linear pair").stack(3)
    optimizer = StackOptimizer(model, meta_optimizer("tele", base="sgd"))
    optimizer.loop.meta.rule = dataclasses.replace(optimizer.loop.meta.rule, lr=10.0)  # type: ignore[type-var]
    before = {name: value.detach().clone() for name, value in model.tensors().items()}
    for _ in range(2):
        optimizer.step(lambda: model(batch, probe=True))
    assert optimizer.loop.last_step is not None
    assert optimizer.loop.state is not None
    assert optimizer.loop.state.accepted is not None
    assert not bool(optimizer.loop.last_step.accepted.any())
    assert_close(optimizer.loop.state.accepted.parameters, before, 0.0)


def test_gradients_after_a_teleport_are_those_of_the_place_it_led_to() -> None:
    """What the update rule is given, against a fresh evaluation."""
    own = case("chain of 2022 forms").problem(0)
    meta = meta_optimizer("lr+tele")
    seen: list[Point] = []
    step = meta.rule.step

    def watched(point: Point, *rest: object) -> object:
        seen.append(point)
        return step(point, *rest)  # type: ignore[arg-type]

    meta.rule.step = watched  # type: ignore[assignment, method-assign]
    optimizer = mt.LearnedOptimizer(own.model, meta, own.symmetries, deterministic=True)
    optimizer.step(closure_of(optimizer, lambda: own.loss_of(own.model(*own.inputs))))
    (point,) = seen
    assert not point.stale
    fresh = own.point({name: value[0] for name, value in point.parameters.items()})
    assert float(fresh.loss) == pytest.approx(float(point.loss), rel=1e-9)  # type: ignore[arg-type]
    assert_close({name: value[0] for name, value in point.gradients.items()}, fresh.gradients)


def test_accumulated_gradients_step_without_a_batch_teleport() -> None:
    own = case("2022 form").problem(0)
    optimizer = mt.LearnedOptimizer(own.model, meta_optimizer("lr+tele"), own.symmetries, deterministic=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        other = own.loss_of(own.model(own.inputs[0].flip(0) + 1))
        other.backward()
        loss = own.loss_of(own.model(*own.inputs))
        loss.backward()
        return loss + other

    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.size) == 0


def test_every_kind_of_network_and_mode_goes_down() -> None:
    for mode, kind in itertools.product(["lr", "lr+tele", "update", "update+tele"], KINDS):
        own = case("chain of linear pairs").problem(0)
        meta = network_for(kind, mode, case("chain of linear pairs"), 1)
        optimizer = mt.LearnedOptimizer(own.model, meta, own.symmetries, deterministic=True)
        closure = closure_of(optimizer, lambda own=own: own.loss_of(own.model(*own.inputs)))
        start = float(optimizer.step(closure))
        for _ in range(20):
            optimizer.step(closure)
        assert optimizer.loop.state is not None
        assert float(optimizer.loop.state.progress.last) < start, (mode, kind)


def test_hooks_are_set_once_and_a_saved_model_carries_none_that_work() -> None:
    own = case("chain of rescalings").problem(0)
    optimizer = mt.LearnedOptimizer(own.model, meta_optimizer("lr+tele"), own.symmetries, deterministic=True)

    def hooks() -> int:
        return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in own.model.modules())

    before = hooks()
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: own.loss_of(own.model(*own.inputs))))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: own.model(*own.inputs) / (1 // 0))
    assert hooks() == before
    copied = pickle.loads(pickle.dumps(own.model))
    assert torch.equal(copied(*own.inputs), own.model(*own.inputs))


def test_parameters_that_are_frozen_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    model[4].weight.requires_grad_(False)
    before = model[4].weight.clone()
    optimizer = mt.LearnedOptimizer(model, meta_optimizer("lr+tele"), [mt.Rescaling(model, "0", "2")])
    x = torch.randn(6, 3)
    optimizer.step(closure_of(optimizer, lambda: model(x).square().mean()))
    assert torch.equal(model[4].weight, before)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    other = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    meta = meta_optimizer("lr+tele")
    with pytest.raises(ValueError, match=r"1\.0\.weight"):
        mt.LearnedOptimizer(model, meta, [mt.LinearPair(other, "1.0", "1.1")])
    with pytest.raises(ValueError, match="give the model itself"):
        mt.LearnedOptimizer(model.parameters(), meta, mt.symmetries_of(model))
    with pytest.warns(UserWarning, match=r"goes on without symmetries.*example_input=.*symmetries="):
        mt.LearnedOptimizer(nn.Linear(2, 2), meta)
    for wrong in ({"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -0.1}, {"total_steps": 0}, {"total_steps": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mt.LearnedOptimizer(model, meta, **wrong)  # type: ignore[arg-type]
    optimizer = mt.LearnedOptimizer(model, meta)
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"has to be a scalar.*\(5, 1\)"):
        optimizer.step(lambda: model(x))
    with pytest.raises(CheckpointError, match="no checkpoint 'nowhere'"):
        mt.LearnedOptimizer(model, "nowhere")


def test_flat_networks_name_the_shape_they_were_made_for() -> None:
    meta = network_for("flat", "lr", case("linear pair"), 1)
    own = case("chain of linear pairs").problem(0)
    optimizer = mt.LearnedOptimizer(own.model, meta, own.symmetries, deterministic=True)
    with pytest.raises(ValueError, match=r"made for 1\.weight of shape \(2, 4\); the model has \(5, 4\)"):
        optimizer.step(closure_of(optimizer, lambda: own.loss_of(own.model(*own.inputs))))


def test_a_stack_is_stepped_by_a_probing_closure() -> None:
    model, batch = case("linear pair").stack(2)
    optimizer = StackOptimizer(model, meta_optimizer("lr"))
    with pytest.raises(RuntimeError, match="probe=True"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"probe=True.* not a Tensor"):
        optimizer.step(lambda: model(batch))
    other, _ = case("linear pair").stack(2)
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.step(lambda: other(batch, probe=True))
    before = {name: value.detach().clone() for name, value in model.tensors().items()}
    losses = optimizer.step(lambda: model(batch, probe=True))
    assert torch.equal(losses, other(batch))
    assert not any(torch.equal(value, before[name]) for name, value in model.tensors().items())


@pytest.mark.parametrize("track", [True, False])
def test_an_unroll_is_stepped_by_what_its_model_saw_last(track: bool) -> None:
    model, batch = case("linear pair").stack(2)
    with unroll_context(model, StackOptimizer(model, meta_optimizer("lr")), track) as (patched, differentiable):
        for losses in (patched(batch), patched(batch).sum()):
            with pytest.raises(TypeError, match=r"probe=True.* not a Tensor"):
                differentiable.step(losses)
        seen = patched(batch, probe=True)
        with pytest.raises(ValueError, match="override"):
            differentiable.step(seen, override={"lr": [1.0]})
        with pytest.raises(ValueError, match="params"):
            differentiable.step(seen, params=[])
        with pytest.raises(ValueError, match="other parameters"):
            differentiable.step(model(batch, probe=True))
        # A pass in between, at other data, is not what the step is taken from.
        (inputs,), targets = batch
        patched(((inputs + 1,), targets), probe=True)
        moved = [value.detach().clone() for value in differentiable.step(seen)]
        with pytest.raises(ValueError, match="other parameters"):
            differentiable.step(seen)
    plainly = stacked_run(case("linear pair"), meta_optimizer("lr"), 2, steps=1)[0]
    assert_close(dict(zip(model.names, moved, strict=True)), plainly, 1e-12)


def test_an_unroll_leaves_the_stack_where_it_was() -> None:
    model, batch = case("linear pair").stack(2)
    before = {name: value.detach().clone() for name, value in model.tensors().items()}
    with unroll_context(model, StackOptimizer(model, meta_optimizer("lr+tele"))) as (patched, differentiable):
        differentiable.step(patched(batch, probe=True))
    assert_close(dict(model.tensors()), before, 0.0)


def test_steps_leave_random_numbers_alone() -> None:
    problem = case("chain of 2022 forms")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    own = problem.problem(0)
    with torch.random.fork_rng([]):
        meta = meta_optimizer("update+tele")
    optimizer = mt.LearnedOptimizer(own.model, meta, own.symmetries, deterministic=True)
    optimizer.step(closure_of(optimizer, lambda: own.loss_of(own.model(*own.inputs))))
    assert torch.equal(torch.rand(3), expected)
