"""Optimizers with schedules, beside the libraries' own on single models."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metateleport import Task, TaskFamily, load_family
from metateleport.evaluation import BASELINES, FAIR, RIVALS, Scheduled
from metateleport.evaluation.methods.muon import StackedMuon
from metateleport.evaluation.methods.schedule import DECAYS, factor
from metateleport.families import TaskStack
from metateleport.torchvision import define_operators

LORA: dict[str, Any] = {"width": 6, "depth": 3, "rank": 2, "samples": 60, "batch": 20}
BUDGET = 8


def made(name: str, **settings: Any) -> Scheduled:
    # PEFT imports torchvision where it is installed.
    define_operators()
    pytest.importorskip(RIVALS[name].library or "torch")
    first = {each: choice.values[0] for each, choice in RIVALS[name].choices.items()}
    method = RIVALS[name].make(lr=0.01, **{**first, **settings})
    assert isinstance(method, Scheduled)
    return method


def stack_for(name: str) -> TaskStack:
    if RIVALS[name].needs:
        return load_family("lora_digits", LORA).stack(range(2), "held-out", dtype=torch.float64)
    return load_family("leaky_mlp", {"width": 5, "batch": 4, "samples": 12}).stack(range(2), "held-out")


def alone(task: Task, method: Scheduled, budget: int) -> list[float]:
    """Losses of one task's own model under the optimizer that the method makes, driven by hand."""
    model = copy.deepcopy(task.model)
    own = {name: value for name, value in method.settings.items() if name != "decay"}
    own = {name.removesuffix("_share"): round(v * budget) if name.endswith("_share") else v for name, v in own.items()}
    optimizer: Any = method.make(model, **own)
    largest = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(budget):
        inputs, targets = task.batch(step)
        optimizer.zero_grad()
        task.loss(model(*inputs), *targets).backward()
        for group, lr in zip(optimizer.param_groups, largest, strict=True):
            group["lr"] = lr * factor(method.decay, step, budget)
        optimizer.step()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        losses.append(task.loss(model(*task.inputs), *task.targets).item())
        if hasattr(optimizer, "train"):
            optimizer.train()
    return losses


@pytest.mark.parametrize("name", list(FAIR))
def test_a_stack_takes_the_steps_that_each_task_takes_by_itself(name: str) -> None:
    method, stack = made(name), stack_for(name)
    loss = method.run(stack, BUDGET).loss
    for index, task in enumerate(stack.tasks):
        np.testing.assert_allclose(loss[index, 1:], alone(task, method, BUDGET), rtol=1e-8)


@pytest.mark.parametrize("name", list(FAIR))
def test_methods_leave_the_stack_as_it_was_and_repeat_themselves(name: str) -> None:
    method, stack = made(name), stack_for(name)
    before = {key: value.detach().clone() for key, value in stack.tensors().items()}
    first, second = method.run(stack, BUDGET).loss, method.run(stack, BUDGET).loss
    assert all(torch.equal(before[key], value) for key, value in stack.tensors().items())
    np.testing.assert_array_equal(first, second)
    assert (first[:, -1] < first[:, 0]).all()


def test_muon_is_torchs() -> None:
    torch.manual_seed(0)
    stacks = [nn.Parameter(torch.randn(3, *shape)) for shape in ((5, 9), (9, 4), (1, 6))]
    singles = [[nn.Parameter(value[task].detach().clone()) for value in stacks] for task in range(3)]
    own = StackedMuon([(value, True) for value in stacks], lr=0.02, momentum=0.9)
    theirs = [
        torch.optim.Muon(each, lr=0.02, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for each in singles
    ]
    start = [value.detach().clone() for value in stacks]
    for _ in range(5):
        for place, value in enumerate(stacks):
            value.grad = torch.randn_like(value)
            for task in range(3):
                singles[task][place].grad = value.grad[task].clone()
        own.step()
        for each in theirs:
            each.step()
    for place, value in enumerate(stacks):
        other = torch.stack([single[place] for single in singles])
        moved = (value.detach() - start[place]).norm()
        # Torch's iterations are in bfloat16.
        assert float((value.detach() - other.detach()).norm()) < 0.03 * float(moved)


def test_muon_steps_vectors_as_adamw_does() -> None:
    vector, twin = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    own, theirs = StackedMuon([(vector, False)], lr=0.1), torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        vector.grad, twin.grad = vector.detach().cos(), twin.detach().cos()
        own.step()
        theirs.step()
    torch.testing.assert_close(vector, twin)


def test_the_riemannian_preconditioner_is_pefts() -> None:
    define_operators()
    optimizers = pytest.importorskip("peft.optimizers")
    stack = stack_for("riemannian")
    loss = made("riemannian", reg=1e-3).run(stack, BUDGET).loss

    def theirs(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = optimizers.create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=lr, reg=1e-3, weight_decay=0.0
        )
        return made

    other = Scheduled("theirs", theirs, stacked=False, decay="cosine", lr=0.01).run(stack, BUDGET).loss
    np.testing.assert_allclose(loss, other, rtol=1e-8)


def test_lora_plus_steps_b_further() -> None:
    stack = stack_for("lora+")
    optimizer = made("lora+").make(copy.deepcopy(stack), lr=0.01, ratio=8)
    largest = dict.fromkeys((group["lr"] for group in optimizer.param_groups), 0)
    for group in optimizer.param_groups:
        largest[group["lr"]] += sum(value.numel() for value in group["params"])
    sizes = {factor: sum(v.numel() for k, v in stack.tensors().items() if f"lora_{factor}" in k) for factor in "AB"}
    assert {lr: count for lr, count in largest.items() if count} == {0.01: sizes["A"], 0.08: sizes["B"]}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("budget", [1, 2, 10, 300])
def test_schedules_grow_and_fall_to_zero(decay: Any, budget: int) -> None:
    factors = [factor(decay, step, budget) for step in range(budget)]
    assert max(factors) == pytest.approx(1)
    assert all(0 < each <= 1 for each in factors)
    top = factors.index(max(factors))
    assert all(one >= other for one, other in itertools.pairwise(factors[top:]))
    if decay != "constant" and budget >= 10:
        assert factor(decay, budget, budget) == pytest.approx(0, abs=1e-12)
        assert factors[-1] < 0.2


def test_an_optimizer_per_task_takes_the_steps_of_a_stack(family: TaskFamily) -> None:
    def momentum(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    stack = family.stack(range(2), "held-out")
    alike = Scheduled("momentum", momentum, stacked=False, lr=1e-3).run(stack, 6).loss
    np.testing.assert_allclose(alike, BASELINES["momentum"].make(lr=1e-3).run(stack, 6).loss, rtol=1e-12)


def test_a_task_that_is_lost_stops_no_other(family: TaskFamily) -> None:
    wild = Scheduled("wild", lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr), stacked=False, lr=1e200)
    assert wild.run(family.stack(range(2), "held-out"), 12).loss.shape == (2, 13)
