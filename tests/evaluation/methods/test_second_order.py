"""Second-order rivals: what they solve and what they pay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_cases import lines

from metateleport import TaskFamily, load_family
from metateleport.evaluation import (
    REFERENCES,
    GaussNewton,
)
from metateleport.evaluation.methods.gauss_newton import _System, jacobian_cost


class TestSecondOrder:
    def test_one_step_solves_a_linear_problem(self) -> None:
        family = load_family("leaky_mlp", {"width": 4, "activation": "identity", "samples": 9})
        stack = family.stack(range(2), "held-out")
        small = GaussNewton(damping=1e-12).run(stack, 200).loss
        for index, task in enumerate(stack.tasks):
            fit = torch.linalg.lstsq(task.inputs[0], task.targets[0]).solution
            floor = float((task.inputs[0] @ fit - task.targets[0]).square().sum() / 2)
            assert small[index, -1] == pytest.approx(floor, rel=1e-6)
        line = lines(2)
        # One Jacobian of one output, a trial, and the line is fitted.
        assert GaussNewton(damping=1e-12).run(line, 3).loss[:, 2] == pytest.approx([0, 0], abs=1e-15)
        assert GaussNewton(damping=1e4).run(line, 40).loss[:, -1] == pytest.approx([0, 0], abs=1e-9), "damping falls"

    def test_a_jacobian_costs_its_multiplications(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        tensors = {key: value.detach() for key, value in stack.tensors().items()}
        # Both forward passes take two products. A gradient takes three more, as the data need none; a Jacobian takes
        # three for each of five outputs.
        assert jacobian_cost(stack, tensors, stack.batch(0)) == pytest.approx((2 + 5 * 3) / (2 + 3), rel=0.05)

    def test_gauss_newton_pays_for_jacobians_and_trials(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        loss = GaussNewton(1.0, 1e-3).run(stack, 8).loss
        assert (loss[:, :4] <= loss[:, :1]).all()
        assert (loss[:, 1:4] == loss[:, :1]).all(), "the first step costs 3.4 and a third"
        assert (loss[:, -1] < loss[:, 0]).all()

    def test_a_step_is_that_of_the_damped_gauss_newton_matrix_with_any_loss(self) -> None:
        stack = load_family("digits", {"hidden": 3, "classes": 3, "samples": 6, "batch": None}).stack(
            [0], "train", dtype=torch.float64
        )
        tensors = {key: value.detach() for key, value in stack.tensors().items()}
        system = _System.at(stack, tensors, stack.full, torch.tensor([True]), None)
        factors = system.factors[0]
        gradients = stack.point_at(tensors, stack.full).gradients
        flat = torch.cat([gradients[name][0].flatten() for name in tensors])
        torch.testing.assert_close(factors.mT @ system.rights[0], flat, rtol=1e-9, atol=1e-12)
        matrix = factors.mT @ factors
        shift = 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        step = system.step(torch.tensor([0.1], dtype=torch.float64))
        taken = torch.cat([step[name][0].flatten() for name in tensors])
        torch.testing.assert_close(taken, -torch.linalg.solve(matrix + shift, flat), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("name", [name for name, rival in REFERENCES.items() if not rival.needs])
    @pytest.mark.parametrize("batch", [None, 2])
    def test_references_leave_the_stack_as_it_was_and_repeat_themselves(self, name: str, batch: int | None) -> None:
        pytest.importorskip(REFERENCES[name].library or "torch")
        stack = load_family("leaky_mlp", {"width": 5, "batch": batch}).stack(range(3), "held-out")
        before = {key: value.detach().clone() for key, value in stack.tensors().items()}
        method = REFERENCES[name].make(lr=0.1)
        loss = method.run(stack, 20).loss
        assert all(torch.equal(before[key], value) for key, value in stack.tensors().items())
        np.testing.assert_array_equal(loss, method.run(stack, 20).loss)
        assert (loss[:, -1] < loss[:, 0]).all()

    def test_a_task_that_is_lost_stops_no_other(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        assert GaussNewton(1e200).run(stack, 12).loss.shape == (2, 13)
