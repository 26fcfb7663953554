"""First-order rivals, and gradient descent with a teleport by ascent before it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from metateleport import Task, TaskFamily, load_family
from metateleport.evaluation import (
    BASELINES,
    FirstOrder,
    GradientAscent,
)


def single(task: Task, optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        inputs, targets = task.batch(step)
        optimizer.zero_grad()
        task.loss(model(*inputs), *targets).backward()
        optimizer.step()
        losses.append(task.loss(model(*task.inputs), *task.targets).item())
    return losses


class TestBaselines:
    @pytest.mark.parametrize("batch", [None, 2])
    @pytest.mark.parametrize("name", ["gd", "momentum", "adam"])
    def test_a_stack_takes_the_steps_that_each_task_takes_by_itself(self, name: str, batch: int | None) -> None:
        stack = load_family("leaky_mlp", {"width": 5, "batch": batch}).stack(range(3), "held-out")
        lr = 0.01 if name == "adam" else 1e-3
        method = BASELINES[name].make(lr=lr)
        assert isinstance(method, FirstOrder)
        loss = method.run(stack, 8).loss
        for index, task in enumerate(stack.tasks):
            model = copy.deepcopy(task.model)
            optimizer = method.optimizer(model.parameters(), **method.settings)
            np.testing.assert_allclose(loss[index, 1:], single(task, optimizer, model, 8), rtol=1e-10)

    def test_momentum_has_momentum(self) -> None:
        assert BASELINES["momentum"].make(lr=1.0).settings["momentum"] == 0.9

    @pytest.mark.parametrize("name", list(BASELINES))
    def test_a_method_leaves_the_stack_as_it_was_and_repeats_itself(self, name: str, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        before = {key: value.detach().clone() for key, value in stack.tensors().items()}
        method = BASELINES[name].make(lr=1e-3)
        first, second = method.run(stack, 14).loss, method.run(stack, 14).loss
        assert all(torch.equal(before[key], value) for key, value in stack.tensors().items())
        np.testing.assert_array_equal(first, second)
        assert (first[:, -1] < first[:, 0]).all()

    def test_gradient_ascent_pays_for_its_teleport(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        loss = GradientAscent(1e-3, ascent_steps=1).run(stack, 8).loss
        # Two layers: a gradient is rebuilt for a third, its derivative costs a whole one, once here; so 2 1/3 with
        # the evaluation itself.
        assert (loss[:, 1:3] == loss[:, :1]).all()
        assert (loss[:, 3] < loss[:, 0]).all()

    def test_gradient_ascent_drifts_little_and_raises_the_gradient(self, family: TaskFamily) -> None:
        trajectory = GradientAscent(1e-3, ascent_steps=3).run(family.stack(range(4), "held-out"), 8)
        assert trajectory.drift_max is not None
        assert 0 < trajectory.drift_max < 1e-9

    def test_gradient_ascent_survives_a_task_that_explodes(self, family: TaskFamily) -> None:
        trajectory = GradientAscent(1e3, "before every 10th step", 1).run(family.stack(range(2), "held-out"), 30)
        assert trajectory.diverged.all()
        # It stays where it was lost, and is not teleported from there.
        assert np.isfinite(trajectory.loss).all()
        assert trajectory.drift_max is not None
        assert trajectory.drift_max < 1e-6
