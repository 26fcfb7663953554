"""L-BFGS task by task is torch's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from evaluation_cases import lines
from torch import Tensor, nn

from metateleport import Task, TaskFamily, load_family
from metateleport.evaluation import (
    LBFGS,
)


class TestLBFGS:
    @pytest.mark.parametrize("lr", [1.0, 0.3])
    def test_it_is_torchs_and_every_evaluation_is_counted(self, family: TaskFamily, lr: float) -> None:
        stack = family.stack(range(2), "held-out")
        budget = 25
        loss = LBFGS(lr).run(stack, budget).loss
        for index, task in enumerate(stack.tasks):
            for calls in (7, 16, budget):
                assert loss[index, calls] == pytest.approx(self.reference(task, lr, calls), rel=1e-9)

    @staticmethod
    def reference(task: Task, lr: float, calls: int) -> float:
        """The last point that one long call of torch's optimizer has accepted within so many closure calls."""
        best = task.loss(task.model(*task.inputs), *task.targets).item()
        for iterations in range(1, calls):
            model = copy.deepcopy(task.model)
            optimizer = torch.optim.LBFGS(
                model.parameters(), lr, iterations, 1000, 0.0, 0.0, line_search_fn="strong_wolfe"
            )
            made = 0

            def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                nonlocal made
                made += 1
                optimizer.zero_grad()
                loss = task.loss(model(*task.inputs), *task.targets)
                loss.backward()
                return loss

            optimizer.step(closure)
            if made > calls:
                return best
            best = task.loss(model(*task.inputs), *task.targets).item()
        return best

    def test_it_ends_at_a_minimum(self) -> None:
        stack = lines(1)
        assert LBFGS().run(stack, 50).loss[0, -1] == pytest.approx(0, abs=1e-20)

    def test_it_runs_on_minibatches(self) -> None:
        stack = load_family("leaky_mlp", {"width": 4, "samples": 8, "batch": 4}).stack(range(2), "held-out")
        assert np.isfinite(LBFGS().run(stack, 10).loss).all()
