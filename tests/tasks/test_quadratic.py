"""`quadratic`: its condition and its directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gallery_cases import close, load


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e6])
def test_quadratics_have_the_condition_asked_for(condition: float) -> None:
    task = load("quadratic", {"dimension": 8, "condition": condition}).task(0)
    matrix = task.inputs[0]
    assert torch.equal(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    close(values, torch.logspace(-float(np.log10(condition)), 0, 8, dtype=torch.float64), 1e-9)
    x = next(task.model.parameters()).detach()
    close(task.loss(task.model(matrix)).detach(), x @ matrix @ x / 2)
    assert task.targets == ()


def test_quadratics_are_turned_every_way() -> None:
    family = load("quadratic", {"dimension": 2, "condition": 1e6})
    axes = torch.stack([torch.linalg.eigh(family.task(index).inputs[0])[1][:, 1] for index in range(400)])
    # The mean projection on the steep axis is half the identity where all directions are alike.
    close(axes.T @ axes / 400, torch.eye(2, dtype=torch.float64) / 2, 0.2)
