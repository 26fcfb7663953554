r"""Meta-training as in the source paper's code: one task at a time, unrolled by hand.

Two linear layers of equal width, $L = \tfrac12 \|Y - W_2 s(W_1 X)\|^2$, a two-layer LSTM over all gradients flattened,
first-order group elements $(I + T, I - T)$ with $\|T\| = 0.01$, inner gradients without second derivatives, and one
step of Adam after the window of each task. What the source's code computes without using it (a pseudo-inverse at every
step) is left out. Networks are in float32 and tasks in float64, as in this library.

Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 5 and appendix E.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from metateleport import Task

__all__ = ["SOURCE_HIDDEN", "SourceNetworks", "SourceTask", "window"]

SOURCE_HIDDEN = {"update": 300, "update+tele": 300, "lr+tele": 20, "tele": 20}
"""Units of the LSTMs in the source's code; it has no mode `lr`."""

_SLOPE, _GENERATOR_NORM, _RATE = 0.1, 0.01, 1e-4

Cells = tuple[Tensor, Tensor, Tensor, Tensor]


class SourceTask(NamedTuple):
    """One regression; data in columns.

    Args:
        weights: of both layers, `(width, width)`.
        inputs: `(width, samples)`.
        inverse: pseudo-inverse of the inputs, made once a task.
        targets: `(width, samples)`.
    """

    weights: tuple[Tensor, Tensor]
    inputs: Tensor
    inverse: Tensor
    targets: Tensor

    @classmethod
    def of(cls, task: Task, device: torch.device) -> SourceTask:
        """A task of the family `leaky_mlp` with two layers."""
        first, second = (value.detach().to(device).requires_grad_() for value in task.model.parameters())
        inputs, targets = (value[0].to(device).mT.contiguous() for value in (task.inputs, task.targets))
        return cls((first, second), inputs, torch.linalg.pinv(inputs), targets)


class _GradientLSTM(nn.Module):
    """Two LSTM layers over the flattened gradients of one task."""

    def __init__(self, coordinates: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(coordinates, hidden), nn.LSTMCell(hidden, hidden)

    def forward(self, gradients: Tensor, cells: Cells | None) -> tuple[Tensor, Cells]:
        first = self.first(gradients, None if cells is None else cells[:2])
        second = self.second(first[0], None if cells is None else cells[2:])
        return second[0], (*first, *second)


class SourceNetworks(nn.Module):
    """The networks of one mode.

    Args:
        mode: `update`, `update+tele`, `lr+tele` or `tele`.
        width: of both layers.
        hidden: units of each LSTM layer.
    """

    def __init__(self, mode: str, width: int, hidden: int) -> None:
        super().__init__()
        self.mode, self.width = mode, width
        count = 2 * width * width
        if "tele" in mode:
            self.teleporter = _GradientLSTM(count, hidden)
            self.generator = nn.Linear(hidden, width * width)
        if mode == "lr+tele":
            self.rate = nn.Linear(hidden, 1)
            with torch.no_grad():
                # Learning rates of the usual size: with larger ones the loss overflows within a window.
                self.rate.weight.mul_(_RATE)
                self.rate.bias.fill_(_RATE)
        if mode.startswith("update"):
            self.updater = _GradientLSTM(count, hidden)
            self.update = nn.Linear(hidden, count)


def evaluate(weights: tuple[Tensor, Tensor], task: SourceTask) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, in the graph, and its gradients, which are not."""
    outputs = weights[1] @ leaky_relu(weights[0] @ task.inputs, _SLOPE)
    loss = (task.targets - outputs).square().sum() / 2
    return loss, torch.autograd.grad(loss, weights, retain_graph=True)


def teleport(weights: tuple[Tensor, Tensor], generator: Tensor, task: SourceTask) -> tuple[Tensor, Tensor]:
    """The 2022 action of a generator, to first order."""
    generator = generator / torch.linalg.matrix_norm(generator) * _GENERATOR_NORM
    unit = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    features = (unit + generator) @ leaky_relu(weights[0] @ task.inputs, _SLOPE)
    return leaky_relu(features, 1 / _SLOPE) @ task.inverse, weights[1] @ (unit - generator)


def window(networks: SourceNetworks, task: SourceTask, length: int) -> Tensor:
    """The sum of losses along one window of inner steps, in the graph.

    Args:
        networks: of one mode.
        task: at its start.
        length: inner steps.

    Returns:
        A scalar.
    """
    weights, total = task.weights, torch.zeros((), dtype=task.inputs.dtype, device=task.inputs.device)
    teleporter_cells: Cells | None = None
    updater_cells: Cells | None = None
    _, gradients = evaluate(weights, task)
    for _ in range(length):
        rate: float | Tensor = _RATE
        if "tele" in networks.mode:
            hidden, teleporter_cells = networks.teleporter(_flat(gradients), teleporter_cells)
            generator = networks.generator(hidden).reshape(networks.width, networks.width)
            if networks.mode == "lr+tele":
                rate = networks.rate(hidden).clamp(1e-7, 5e-3).squeeze().to(total.dtype)
            weights = teleport(weights, generator.to(total.dtype), task)
        loss, gradients = evaluate(weights, task)
        total = total + loss
        if networks.mode.startswith("update"):
            hidden, updater_cells = networks.updater(_flat(gradients), updater_cells)
            changes = networks.update(hidden).to(total.dtype).reshape(2, networks.width, networks.width)
            weights = (weights[0] - changes[0], weights[1] - changes[1])
        else:
            weights = (weights[0] - rate * gradients[0], weights[1] - rate * gradients[1])
    return total


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([each.flatten() for each in gradients]).unsqueeze(0).float()
