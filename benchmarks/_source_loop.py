r"""Meta-training as in the source paper's code: one task at a time, unrolled by hand.

Two linear layers of equal width, $L = \tfrac12 \|Y - W_2 s(W_1 X)\|^2$, a two-layer LSTM over all gradients flattened,
first-order group elements $(I + T, I - T)$ with $\|T\| = 0.01$, inner gradients without second derivatives, and one
step of Adam after the window of each task. What the source's code computes without using it (a pseudo-inverse at every
step) is left out. Networks are in float32 and tasks in float64, as in this library.

With several tasks stacked the same functions are its roof: what the source's networks would cost if their loop were
batched by hand. Mode `sgd`, with one learned rate and no network, is the floor: the tasks' own passes and steps.

Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 5 and appendix E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from metateleport import Task

__all__ = ["FLOOR", "SOURCE_HIDDEN", "SourceNetworks", "SourceTask", "window"]

SOURCE_HIDDEN = {"update": 300, "update+tele": 300, "lr+tele": 20, "tele": 20}
"""Units of the LSTMs in the source's code; it has no mode `lr`."""

FLOOR = "sgd"
"""The mode without networks."""

_SLOPE, _GENERATOR_NORM, _RATE = 0.1, 0.01, 1e-4

Cells = tuple[Tensor, Tensor, Tensor, Tensor]


class SourceTask(NamedTuple):
    """One regression, or several with a dimension in front; data in columns.

    Args:
        weights: of both layers, `(*tasks, width, width)`.
        inputs: `(*tasks, width, samples)`.
        inverse: pseudo-inverse of the inputs, made once a task.
        targets: `(*tasks, width, samples)`.
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

    @classmethod
    def stacked(cls, tasks: Sequence[SourceTask]) -> SourceTask:
        """Several tasks side by side."""
        first, second = (torch.stack([task.weights[place].detach() for task in tasks]) for place in (0, 1))
        inputs, inverse, targets = (torch.stack(list(part)) for part in list(zip(*tasks, strict=True))[1:])
        return cls((first.requires_grad_(), second.requires_grad_()), inputs, inverse, targets)


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
        mode: `update`, `update+tele`, `lr+tele`, `tele` or `sgd`.
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
        if mode == FLOOR:
            self.constant = nn.Parameter(torch.tensor(_RATE))
        if mode.startswith("update"):
            self.updater = _GradientLSTM(count, hidden)
            self.update = nn.Linear(hidden, count)


def evaluate(weights: tuple[Tensor, Tensor], task: SourceTask) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, summed over tasks, in the graph, and its gradients, which are not."""
    outputs = weights[1] @ leaky_relu(weights[0] @ task.inputs, _SLOPE)
    loss = (task.targets - outputs).square().sum() / 2
    return loss, torch.autograd.grad(loss, weights, retain_graph=True)


def teleport(weights: tuple[Tensor, Tensor], generator: Tensor, task: SourceTask) -> tuple[Tensor, Tensor]:
    """The 2022 action of a generator, to first order."""
    generator = generator / torch.linalg.matrix_norm(generator, keepdim=True) * _GENERATOR_NORM
    unit = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    features = (unit + generator) @ leaky_relu(weights[0] @ task.inputs, _SLOPE)
    return leaky_relu(features, 1 / _SLOPE) @ task.inverse, weights[1] @ (unit - generator)


def window(networks: SourceNetworks, task: SourceTask, length: int) -> Tensor:
    """The sum of losses along one window of inner steps, in the graph.

    Args:
        networks: of one mode.
        task: one or several, at their start.
        length: inner steps.

    Returns:
        A scalar.
    """
    weights, total = task.weights, torch.zeros((), dtype=task.inputs.dtype, device=task.inputs.device)
    teleporter_cells: Cells | None = None
    updater_cells: Cells | None = None
    _, gradients = evaluate(weights, task)
    for _ in range(length):
        rate: float | Tensor = networks.constant.to(total.dtype) if networks.mode == FLOOR else _RATE
        if "tele" in networks.mode:
            hidden, teleporter_cells = networks.teleporter(_flat(gradients), teleporter_cells)
            generator = networks.generator(hidden).reshape(weights[0].shape)
            if networks.mode == "lr+tele":
                rates = networks.rate(hidden).clamp(1e-7, 5e-3).to(total.dtype)
                rate = rates.unsqueeze(-1) if weights[0].ndim > 2 else rates.squeeze()
            weights = teleport(weights, generator.to(total.dtype), task)
        loss, gradients = evaluate(weights, task)
        total = total + loss
        if networks.mode.startswith("update"):
            hidden, updater_cells = networks.updater(_flat(gradients), updater_cells)
            first, second = networks.update(hidden).to(total.dtype).chunk(2, -1)
            weights = (weights[0] - first.reshape(weights[0].shape), weights[1] - second.reshape(weights[1].shape))
        else:
            weights = (weights[0] - rate * gradients[0], weights[1] - rate * gradients[1])
    return total


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    width = gradients[0].shape[-1]
    return torch.cat([each.reshape(-1, width * width) for each in gradients], 1).float()
