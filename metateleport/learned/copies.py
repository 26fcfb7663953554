"""Networks stacked: one layer with weights of its own for each part of a stack of tasks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Copies", "weight_by_task"]


class Copies(nn.Module):
    """Several copies of one linear layer or LSTM cell, each for its own part of a stack of tasks.

    The tasks of the first copy come first, then those of the second, and so on, as many for each. An input
    `(rows, features)` has a row for each task, or several sets of such rows one after the other; an input
    `(tasks, rows, features)` has the rows of one task beside each other.

    Args:
        copies: of `nn.Linear` or `nn.LSTMCell`, of one shape.
        tasks: number of tasks of each copy; if not given, two-dimensional inputs have one set of rows.

    Example:
        >>> stack = Copies([nn.Linear(3, 2), nn.Linear(3, 2)])
        >>> x = torch.randn(10, 3)
        >>> torch.allclose(stack(x)[5:], stack.copy(1)(x[5:]), atol=1e-6)
        True
        >>> each = Copies([nn.Linear(3, 2), nn.Linear(3, 2)], tasks=1)
        >>> torch.allclose(each(x)[1::2], each.copy(1)(x[1::2]), atol=1e-6)
        True
    """

    def __init__(self, copies: Sequence[nn.Module], tasks: int | None = None) -> None:
        super().__init__()
        # In a list, so that it is no child of this module: it tells the shape, and its weights are not used.
        self._template = [copy.deepcopy(copies[0])]
        self.count, self.tasks = len(copies), tasks
        for name, _ in copies[0].named_parameters():
            values = torch.stack([each.get_parameter(name).detach() for each in copies])
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Any:
        if isinstance(self._template[0], nn.Linear):
            return self._linear(inputs, "weight", "bias")
        assert state is not None
        hidden, memory = state
        # torch's LSTMCell has no batching rule; its equations, gates in its order.
        gates = self._linear(inputs, "weight_ih", "bias_ih") + self._linear(hidden, "weight_hh", "bias_hh")
        entry, forget, candidate, exit_ = gates.chunk(4, -1)
        memory = forget.sigmoid() * memory + entry.sigmoid() * candidate.tanh()
        return exit_.sigmoid() * memory.tanh(), memory

    def copy(self, number: int) -> nn.Module:
        """One of the copies, with weights of its own."""
        made = copy.deepcopy(self._template[0])
        made.load_state_dict({name: value[number] for name, value in self.state_dict().items()})
        return made

    def _linear(self, inputs: Tensor, weight: str, bias: str) -> Tensor:
        size = inputs.shape[-1]
        if inputs.ndim > 2:
            return self._multiplied(inputs.reshape(self.count, -1, size), weight, bias).reshape(*inputs.shape[:-1], -1)
        tasks = self.tasks or inputs.shape[0] // self.count
        sets = inputs.reshape(-1, self.count, tasks, size)
        parts = self._multiplied(sets.transpose(0, 1).reshape(self.count, -1, size), weight, bias)
        return parts.reshape(self.count, -1, tasks, parts.shape[-1]).transpose(0, 1).flatten(0, 2)

    def _multiplied(self, parts: Tensor, weight: str, bias: str) -> Tensor:
        weights, biases = self.get_parameter(weight), self._parameters.get(bias)
        return parts @ weights.mT if biases is None else torch.baddbmm(biases.unsqueeze(1), parts, weights.mT)


def weight_by_task(layer: nn.Module, tasks: int) -> Tensor:
    """The weight that a layer has for each task of a stack, `(tasks, outputs, inputs)`.

    Args:
        layer: an `nn.Linear`, whose weight all tasks share, or `Copies` of one.
        tasks: their number.

    Example:
        >>> one, other = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> weight_by_task(one, 4).shape, bool((weight_by_task(Copies([one, other]), 4)[2] == other.weight).all())
        (torch.Size([4, 2, 3]), True)
    """
    weight = layer.get_parameter("weight")
    return weight.expand(tasks, -1, -1) if weight.ndim == 2 else weight.repeat_interleave(tasks // len(weight), 0)
