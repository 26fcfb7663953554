"""A stack of tasks is its tasks side by side, in the graph of an unroll too."""

from __future__ import annotations

import copy
from typing import Any

import higher
import pytest
import torch
from symmetry_cases import CASES, Case, assert_close, case, side_by_side
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import ProbedLosses, Task, TaskStack, stacked_name

TASKS = 3
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_losses_outputs_and_points_are_those_of_single_models(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    losses, point = stacked(batch), stacked.point_at(stacked.tensors(), batch)
    outputs = stacked.outputs(stacked.tensors(), batch[0])
    assert losses.shape == (TASKS,)
    assert torch.equal(stacked.losses_at(stacked.tensors(), batch), losses)
    for seed in range(TASKS):
        problem = case.problem(seed)
        single = problem.point()
        assert float(losses[seed].detach()) == pytest.approx(float(single.loss), rel=1e-12)
        assert torch.allclose(outputs[seed], problem.outputs(), rtol=1e-12)
        for name in ("parameters", "gradients", "activations", "cotangents"):
            assert_close(
                {key: value[seed] for key, value in getattr(point, name).items()}, getattr(single, name), 1e-12
            )


@every_case
def test_pullback_gives_the_gradients_below(case: Case) -> None:
    stacked, batch = case.stack(TASKS)
    point = stacked.point_at(stacked.tensors(), batch)
    assert point.pullback is not None
    for symmetry in stacked.symmetries:
        # A layer of keys takes in the model's own input: there is nothing below it.
        name = symmetry.modules[-1] if symmetry.modules else ""
        weight = point.parameters.get(f"{name}.weight")
        if weight is None or weight.ndim != 3 or "convolution" in case.name or name == "key":
            continue
        lower, cotangents = point.pullback(name, point.cotangents[name] @ weight)
        assert lower
        assert_close(lower, {key: point.gradients[key] for key in lower}, 1e-12)
        assert_close(cotangents, {key: point.cotangents[key] for key in cotangents}, 1e-12)
        own = {f"{name}.weight", f"{name}.bias"}
        assert not own & set(lower)


def test_probing_gives_the_same_point_in_the_graph() -> None:
    stacked, batch = case("chain of rescalings").stack(TASKS)
    seen = stacked(batch, probe=True)
    point = seen.point(in_graph=True)
    fresh = stacked.point_at(stacked.tensors(), batch)
    assert point.loss is seen.losses
    assert torch.equal(seen.losses, stacked(batch))
    assert_close(point.gradients, fresh.gradients, 1e-12)
    assert_close(point.cotangents, fresh.cotangents, 1e-12)
    assert all(value.requires_grad for value in point.gradients.values())
    assert not any(value.requires_grad for value in fresh.gradients.values())


def test_what_was_seen_stays_as_it_was_seen() -> None:
    """Passes leave nothing in the stack: later ones change neither it nor what earlier ones returned."""
    stacked, batch = case("rescaling").stack(TASKS)
    (inputs,), targets = batch
    # What is made of the models and the data once is there from the first pass on.
    stacked(batch, probe=True)
    before = set(vars(stacked))
    first = stacked(batch, probe=True)
    expected = first.point(in_graph=False).gradients
    second = stacked(((2 * inputs,), targets), probe=True)
    assert_close(first.point(in_graph=False).gradients, expected, 0.0)
    assert not torch.allclose(second.losses, first.losses)
    assert set(vars(stacked)) == before
    assert not any(isinstance(value, ProbedLosses) for value in vars(stacked).values())


def test_evaluating_elsewhere_leaves_the_stack_where_it_is() -> None:
    stacked, batch = case("rescaling").stack(TASKS)
    before = {name: value.clone() for name, value in stacked.tensors().items()}
    other = {name: value + 1 for name, value in before.items()}
    point = stacked.point_at(other, batch)
    assert torch.equal(point.loss, stacked.losses_at(other, batch))
    assert not torch.equal(point.loss, stacked.losses_at(before, batch))
    assert all(torch.equal(value, before[name]) for name, value in stacked.tensors().items())
    stacked.load(other)
    assert all(torch.equal(value, other[name]) for name, value in stacked.tensors().items())


def test_batches_of_another_shape() -> None:
    stacked, (inputs, targets) = case("rescaling").stack(TASKS)
    for samples in (6, 2, 6):
        part = (inputs[0][:, :samples],), (targets[0][:, :samples],)
        seen = stacked(part, probe=True)
        assert seen.losses.shape == (TASKS,)
        assert seen.point(in_graph=False).cotangents["2"].shape == (TASKS, samples, 2)


@pytest.mark.parametrize("name", ["rescaling", "rescaling, convolution to linear", "quadratic"])
def test_an_unroll_through_higher_equals_one_written_by_hand(name: str) -> None:
    build, steps = case(name), 4
    stacked, batch = build.stack(TASKS)
    rate = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(stacked.parameters(), lr=1.0)
    along = []
    with higher.innerloop_ctx(stacked, optimizer, override={"lr": [rate]}) as (patched, inner):
        for _ in range(steps):
            losses = patched(batch)
            along.append(losses)
            inner.step(losses.sum())
        along.append(patched(batch))
        meta_loss = torch.stack(along).log().mean()
        (meta_gradient,) = torch.autograd.grad(meta_loss, rate)

    problems = [build.problem(seed) for seed in range(TASKS)]

    def by_hand(rate: Tensor) -> tuple[Tensor, Tensor]:
        curves = []
        for problem in problems:
            parameters = {name: value.detach() for name, value in problem.model.named_parameters()}

            def loss(parameters: dict[str, Tensor], problem=problem) -> Tensor:  # type: ignore[no-untyped-def]
                return problem.loss_of(torch.func.functional_call(problem.model, parameters, problem.inputs))

            curve = []
            for _ in range(steps):
                gradients, value = torch.func.grad_and_value(loss)(parameters)
                curve.append(value)
                parameters = {name: value - rate * gradients[name] for name, value in parameters.items()}
            curves.append(torch.stack([*curve, loss(parameters)]))
        losses = torch.stack(curves, -1)
        return losses.log().mean(), losses

    expected, losses = torch.func.grad(by_hand, has_aux=True)(rate.detach())
    assert torch.allclose(torch.stack(along), losses, rtol=1e-12)
    assert torch.allclose(meta_gradient, expected, rtol=1e-10)
    assert float(meta_gradient.abs()) > 0


def test_points_of_an_unroll_carry_its_graph() -> None:
    build = case("chain of 2022 forms")
    stacked, batch = build.stack(TASKS)
    rate = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)

    def unrolled(rate: Tensor) -> Tensor:
        optimizer = torch.optim.SGD(stacked.parameters(), lr=1.0)
        with higher.innerloop_ctx(stacked, optimizer, override={"lr": [rate]}) as (patched, inner):
            inner.step(patched(batch).sum())
            point = patched(batch, probe=True).point(in_graph=True)
            for symmetry in reversed(stacked.symmetries):
                element = symmetry.group.random(TASKS, size=0.3, seed=1, dtype=torch.float64)
                point = symmetry.act(element, point)
            return sum(value.square().sum() for value in point.gradients.values())

    (found,) = torch.autograd.grad(unrolled(rate), rate)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = rate + step, rate - step
    difference = (unrolled(ahead.requires_grad_()) - unrolled(behind.requires_grad_())) / (2 * step)
    assert float(found) == pytest.approx(float(difference), rel=1e-5)


def test_buffers_and_dropout_are_each_tasks_own() -> None:
    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("shift", torch.tensor(shift))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.shift

    models = [Shifted(value) for value in (1.0, 5.0)]
    x = torch.randn(2, 4, 2)
    stacked = side_by_side(models, nn.functional.mse_loss, ((x,), (x,)))
    found = stacked.outputs(stacked.tensors(), (x,))
    assert torch.allclose(found, torch.stack([model(each) for model, each in zip(models, x, strict=True)]))
    assert set(stacked.tensors()) == {"layer.weight", "layer.bias"}
    ones = torch.ones(2, 1, 2)
    layers = [nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5)) for _ in range(2)]
    dropped = side_by_side(layers, nn.functional.mse_loss, ((ones,), (torch.ones(2, 1, 50),)))
    kept = dropped.outputs(dropped.tensors(), (ones,)) != 0
    assert not torch.equal(kept[0], kept[1])


def test_the_template_is_neither_trained_nor_listed() -> None:
    stacked, batch = case("linear pair").stack(TASKS)
    before = {name: value.clone() for name, value in stacked.template.named_parameters()}
    optimizer = torch.optim.SGD(stacked.parameters(), lr=0.1)
    stacked(batch).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in stacked.template.named_parameters())
    assert {value.shape[0] for value in stacked.parameters()} == {TASKS}


def test_what_cannot_be_stacked_is_refused() -> None:
    data = ((torch.ones(2, 4, 2),), (torch.ones(2, 4, 1),))
    for other in (nn.Linear(3, 1), nn.Linear(2, 1, bias=False)):
        with pytest.raises(ValueError, match="one architecture"):
            side_by_side([nn.Linear(2, 1), other], nn.functional.mse_loss, data)


def test_the_old_name_says_which_class_there_is_now() -> None:
    with pytest.raises(AttributeError, match=r"one class now: metateleport.families.TaskStack\(tasks\)"):
        _ = mt.StackedModel
    with pytest.warns(FutureWarning, match="TaskStack"):
        assert mt.TaskStack is TaskStack


def test_a_model_may_call_its_parameters_as_a_stack_calls_its_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("full", "loss", "tasks", "device", "names", "batch"):
                self.register_parameter(name, nn.Parameter(torch.randn(2)))
            self.register_buffer("measure", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.measure * sum(self.parameters())

    data = ((torch.randn(3, 4, 2),), (torch.randn(3, 4, 2),))
    models = [Named() for _ in range(3)]
    stack = side_by_side(models, nn.functional.mse_loss, data)
    expected = [nn.functional.mse_loss(models[task](data[0][0][task]), data[1][0][task]) for task in range(3)]
    torch.testing.assert_close(stack(stack.full), torch.stack(expected))
    assert set(stack.tensors()) == {name for name, _ in models[0].named_parameters()}


@pytest.mark.parametrize("how", ["deepcopy", "higher", "learn2learn"])
def test_a_copy_has_its_own_parameters_and_shares_tasks_and_data(how: str) -> None:
    stack, _ = case("rescaling").stack(TASKS)
    held, start = stack.full, {name: value.clone() for name, value in stack.tensors().items()}
    if how == "deepcopy":
        twin: Any = copy.deepcopy(stack)
    elif how == "higher":
        twin = higher.patch.monkeypatch(stack, copy_initial_weights=True)
    else:
        twin = pytest.importorskip("learn2learn").clone_module(stack)
    assert twin.tasks is stack.tasks
    assert twin.full is held
    assert len(twin) == TASKS
    torch.testing.assert_close(twin(twin.full), stack(stack.full))
    if how == "deepcopy":
        twin.load({name: value + 1 for name, value in start.items()})
        assert all(isinstance(value, nn.Parameter) for value in twin.parameters())
    assert_close(stack.tensors(), start, 0.0)
    assert {id(value) for value in twin.parameters()}.isdisjoint(id(value) for value in stack.parameters())


def test_data_are_neither_parameters_nor_buffers_and_follow_to_another_device() -> None:
    stack, batch = case("rescaling").stack(TASKS)
    data = {id(value) for part in batch for value in part}
    assert data.isdisjoint(id(value) for value in (*stack.parameters(), *stack.buffers()))
    assert len(list(stack.parameters())) == len(stack.names) == 4
    stack.to("meta")
    assert {value.device.type for part in stack.full for value in part} == {"meta"}
    assert batch[0][0].device.type == "cpu"


def test_what_tasks_share_is_not_copied() -> None:
    base = nn.Linear(3, 2).requires_grad_(False)
    tasks = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), base)
        tasks.append(Task(model, nn.functional.mse_loss, (torch.ones(4, 3),), (torch.ones(4, 2),), seed=seed))
    stack, apart = TaskStack(tasks), TaskStack([copy.deepcopy(task) for task in tasks])
    name = stacked_name("1.weight")
    assert getattr(stack, name).stride(0) == 0 < getattr(apart, name).stride(0)
    assert getattr(stack, name).data_ptr() == base.weight.data_ptr()
    torch.testing.assert_close(stack(stack.full), apart(apart.full))
    twin = copy.deepcopy(stack)
    torch.testing.assert_close(twin(twin.full), apart(apart.full))
