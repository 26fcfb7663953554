"""The update by an LSTM for each tensor: its size, its bounds, its invariances, and its meta-gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gradient_cases import analytic, attached, compare, error, plain, recorded, stack, unrolled
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_cases import shape_of
from symmetry_cases import side_by_side
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.learned import LearnedTeleporter, MetaOptimizer
from metateleport.learned.progress import Progress
from metateleport.learned.rules.step import StepRule
from metateleport.learned.rules.tensor import TensorRule
from metateleport.point import Point
from metateleport.teleporters import travel

TOLERANCE = 1e-6


def rule_of(size: float = 1.0, seed: int = 0, **sizes: int) -> TensorRule:
    """A rule in float64 whose networks do something; `size` scales all of their weights."""
    torch.manual_seed(seed)
    rule = TensorRule(**{"hidden": 5, "units": 3, **sizes}).double()
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.mul_(size)
        rule.steering.weight.mul_(5)
        rule.second.weight.mul_(5)
    return rule


def meta_optimizer(mode: str = "lr", hidden: int = 4) -> MetaOptimizer:
    torch.manual_seed(0)
    meta = MetaOptimizer(shape_of(mode=mode, hidden=hidden)).double()
    meta.rule = rule_of(hidden=hidden)
    if isinstance(meta.teleporter, LearnedTeleporter):
        with torch.no_grad():
            for network in meta.teleporter.networks.values():
                network.head.bias[-1] = -0.5
                network.head.weight.copy_((torch.rand(network.head.weight.shape) - 0.5) / 2)
    return meta


def begun(point: Point) -> Progress:
    assert point.loss is not None
    loss = point.loss.detach()
    return Progress.begin(loss).judge(loss, deterministic=True)[0]


def walk(rule: StepRule, model: TaskStack, batch: Any, steps: int) -> tuple[dict[str, Tensor], Any]:
    """Parameters and state after some steps, all of them accepted."""
    parameters: dict[str, Tensor] = dict(model.tensors())
    state = None
    for _ in range(steps):
        point = model.point_at(parameters, batch)
        state = rule.initial_state(point) if state is None else state
        with torch.no_grad():
            parameters, state = rule.step(point, model.symmetries, begun(point), state)
    return parameters, state


def numbers(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if not isinstance(value, dict | tuple):
        return 0
    return sum(numbers(each) for each in (value.values() if isinstance(value, dict) else value))


def test_it_starts_as_the_learned_step() -> None:
    model, batch = stack("rescaling")
    rule = rule_of()
    with torch.no_grad():
        for parameter in (*rule.steering.parameters(), rule.second.weight):
            parameter.zero_()
    plain_step = StepRule(hidden=5).double()
    shared = {name: value for name, value in rule.state_dict().items() if name.startswith(("cell", "head"))}
    plain_step.load_state_dict(shared)
    ours, theirs = walk(rule, model, batch, 4)[0], walk(plain_step, model, batch, 4)[0]
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-14)
    other = walk(rule_of(), model, batch, 4)[0]
    assert all(bool(((other[name] - value).abs() > 1e-6).any()) for name, value in ours.items())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 30.0, 1e4]))
def test_a_step_is_bounded_whatever_the_networks_say(seed: int, size: float) -> None:
    model, batch = stack("rescaling")
    rule = rule_of(size, seed)
    point = model.point_at(model.tensors(), batch)
    state = rule.initial_state(point)
    with torch.no_grad():
        moved, _ = rule.step(point, model.symmetries, begun(point), state)
        steps, _ = rule._changes(point, model.symmetries, begun(point), state, ())
    for name, step in steps.items():
        rms = step.square().flatten(1).mean(1).sqrt().reshape(-1, *(1,) * (step.ndim - 1))
        taken = (moved[name] - point.parameters[name]).abs()
        assert bool((taken <= (2 * step.abs() + rms) * (1 + 1e-9) + 1e-14).all())


@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_it_does_not_see_the_scale_of_the_loss(factor: float) -> None:
    model, batch = stack("rescaling")
    task = model.tasks[0]
    scaled = TaskStack([dataclasses.replace(task, loss=lambda *given: factor * model.loss(*given))])
    alone = TaskStack([task])
    first = tuple(tuple(value[:1] for value in part) for part in batch)
    ours, theirs = (walk(rule_of(), each, first, 4)[0] for each in (alone, scaled))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-7, atol=1e-9)


def test_permuting_hidden_units_permutes_the_step() -> None:
    model, batch = stack("rescaling")
    order = torch.tensor([2, 0, 1])
    moves = {"0.weight": 1, "0.bias": 1, "2.weight": 2}
    straight = walk(rule_of(), model, batch, 3)[0]
    turned_start = {
        name: value.index_select(moves[name], order) if name in moves else value
        for name, value in model.tensors().items()
    }
    model.load(turned_start)
    turned = walk(rule_of(), model, batch, 3)[0]
    for name, value in straight.items():
        expected = value.index_select(moves[name], order) if name in moves else value
        torch.testing.assert_close(turned[name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["rescaling", "linear pair"])
def test_its_state_moves_with_a_teleport(kind: str) -> None:
    model, batch = stack(kind)
    point = model.point_at(model.tensors(), batch)
    rule = rule_of()
    with torch.no_grad():
        _, state = rule.step(point, model.symmetries, begun(point), rule.initial_state(point))
    arrived, moves, _ = travel(mt.RandomTeleporter(0.5, seed=1), point, model.symmetries, None)
    assert all(bool((move.size > 0.1).all()) for move in moves)
    there = model.point_at(arrived.parameters, batch)
    carried = rule.carry(state, moves, point, torch.ones(len(model), dtype=torch.bool))
    for name, gradient in there.gradients.items():
        # Before its second step a velocity is a gradient, and a second moment a hundredth of its square.
        torch.testing.assert_close(carried["velocity"][name], gradient, rtol=1e-8, atol=1e-9)
        if kind == "rescaling":
            torch.testing.assert_close(carried["squares"][name], gradient.square() / 100, rtol=1e-8, atol=1e-9)
        assert bool((carried["squares"][name] >= 0).all())
    assert all(carried["cells"][name] is state["cells"][name] for name in state["cells"])


def test_a_step_that_was_taken_back_leaves_no_moments() -> None:
    model, batch = stack("rescaling")
    rule = rule_of()
    _, state = walk(rule, model, batch, 3)
    point = model.point_at(model.tensors(), batch)
    assert point.loss is not None
    progress = begun(point)
    progress = progress.judge(point.loss.detach() * torch.tensor([2.0, 0.5]), deterministic=True)[0]
    assert progress.accepted.tolist() == [False, True]
    with torch.no_grad():
        _, after = rule.step(point, model.symmetries, progress, state)
    for name, gradient in point.gradients.items():
        torch.testing.assert_close(after["velocity"][name][0], gradient[0])
        torch.testing.assert_close(after["squares"][name][0], gradient[0].square() / 100)
        assert bool((after["squares"][name][1] > gradient[1].square() / 100).all())


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e150])
def test_gradients_out_of_all_scale_put_no_nan(value: float) -> None:
    model, batch = stack("rescaling")
    point = model.point_at(model.tensors(), batch)
    point = point.update(gradients={name: torch.full_like(each, value) for name, each in point.gradients.items()})
    rule = rule_of()
    state = rule.initial_state(point)
    for _ in range(2):
        moved, state = rule.step(point, model.symmetries, begun(point), state)
        loss = torch.stack([each.sum() for each in moved.values()]).sum()
        assert value > 1 or loss.isfinite()
    found = torch.autograd.grad(loss, list(rule.parameters()), allow_unused=True)
    assert value > 1 or all(each.isfinite().all() for each in found if each is not None)
    if value == 0:
        assert all(torch.equal(moved[name], point.parameters[name]) for name in moved)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_networks_and_models_may_differ_in_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    model, batch = stack("rescaling")
    model = model.to(dtypes[1])
    given = tuple(tuple(value.to(dtypes[1]) for value in part) for part in batch)
    moved, state = walk(rule_of().to(dtypes[0]), model, given, 2)
    for name, value in model.tensors().items():
        assert moved[name].dtype == dtypes[1]
        assert moved[name].shape == value.shape
        assert state["squares"][name].dtype == state["velocity"][name].dtype == dtypes[1]
        assert all(part.dtype == dtypes[0] for part in state["cells"][name])


PROBLEMS = [("lr", "linear pair"), ("lr", "rescaling"), ("lr+tele", "linear pair"), ("lr+tele", "rescaling")]
every_problem = pytest.mark.parametrize(("mode", "kind"), PROBLEMS)


@every_problem
@pytest.mark.parametrize("steps", [1, 4])
def test_meta_gradient_with_nothing_detached(mode: str, kind: str, steps: int) -> None:
    meta, problem = attached(meta_optimizer(mode)), stack(kind)
    assert compare(meta, problem, steps, plain(meta, problem, steps)) < TOLERANCE


@every_problem
def test_meta_gradient_at_recorded_features(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, problem = meta_optimizer(mode), stack(kind)
    gradient = analytic(meta, problem, 4)
    assert error(gradient, recorded(meta, problem, 4, monkeypatch), meta) < TOLERANCE


def test_every_network_learns() -> None:
    meta, problem = meta_optimizer(), stack("rescaling")
    unrolled(meta, problem, 2, track=True)[0].backward()
    for name, parameter in meta.rule.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 1e-8, name
    rule = meta.rule
    assert isinstance(rule, TensorRule)
    assert rule.steering.bias.grad is not None
    assert bool((rule.steering.bias.grad.abs() > 1e-10).all()), "each of what steers the coordinates does something"


def test_it_can_be_trained() -> None:
    meta, problem = meta_optimizer(), stack("rescaling")
    optimizer = torch.optim.Adam(meta.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, _ = unrolled(meta, problem, 5, track=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


# Large models


def large() -> tuple[TaskStack, Any]:
    """A perceptron of 1.1 million parameters, on noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))
    symmetries = [mt.Rescaling(model, "0", "2"), mt.Rescaling(model, "2", "4")]
    batch = ((torch.randn(1, 32, 784),), (torch.randint(10, (1, 32)),))
    return side_by_side([model], nn.functional.cross_entropy, batch, symmetries), batch


def test_its_state_is_two_numbers_a_parameter_and_one_lstm_state_a_tensor() -> None:
    model, batch = large()
    rule = TensorRule(hidden=32)
    _, state = walk(rule, model, batch, 1)
    parameters = sum(value.numel() for value in model.tensors().values())
    assert parameters > 1_000_000
    assert numbers(state) == 2 * parameters + 2 * 32 * len(model.names)
    assert numbers(state) < 2.01 * parameters
    small = stack("rescaling")
    wide = rule_of(hidden=7)
    own = sum(value.numel() for value in small[0].tensors().values())
    assert numbers(walk(wide, *small, 1)[1]) == 2 * own + 2 * 7 * len(small[0].names) * len(small[0])


def test_a_model_of_a_million_parameters_is_stepped() -> None:
    model, batch = large()
    torch.manual_seed(1)
    rule = TensorRule()
    before = model.losses_at(model.tensors(), batch)
    moved, _ = walk(rule, model, batch, 5)
    assert float(model.losses_at(moved, batch)) < 0.8 * float(before)
    for name, value in model.tensors().items():
        assert moved[name].shape == value.shape
        assert moved[name].dtype == value.dtype
        assert bool(moved[name].isfinite().all())
    assert sum(parameter.numel() for parameter in rule.parameters()) < 10_000


def test_outputs_are_those_of_the_formula() -> None:
    rule = rule_of()
    features, hidden = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    like = torch.zeros(2, 3, 2, dtype=torch.float64)
    gamma, delta, skip, bias = rule.steering(hidden).split((3, 3, 5, 1), -1)
    shift, gain = rule._outputs(features, hidden, like)
    for task in range(2):
        seen = features[task].mT
        inner = torch.tanh((1 + gamma[task]) * rule.first(seen) + delta[task])
        first, second = rule.second(inner).unbind(-1)
        assert torch.allclose(shift[task].flatten(), torch.tanh(first + seen @ skip[task]), rtol=1e-12)
        assert torch.allclose(gain[task].flatten(), 2 * (second + bias[task]).sigmoid(), rtol=1e-12)
