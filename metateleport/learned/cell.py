r"""LSTM cells over very many samples: one operation forwards and one backwards.

$$i, f, o = \sigma(W x + R h + b), \quad g = \tanh(W x + R h + b), \qquad c' = f c + i g, \quad h' = o \tanh(c').$$

The weights are those of `torch.nn.LSTMCell`, whose steps these are to rounding. Samples are laid out in columns, so
that each gate is one block of memory; a hyperbolic tangent is taken from the sigmoid, $\tanh x = 2\sigma(2x) - 1$,
which processors compute several times as fast. For a few hundred samples torch's own cell is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["State", "recur_columns"]

State = tuple[Tensor, Tensor]
"""Hidden state and memory."""


def recur_columns(cell: nn.LSTMCell, inputs: Tensor, state: State) -> State:
    """One step of a cell: `cell(inputs, state)` with its samples in columns, for many of them.

    Args:
        cell: with biases.
        inputs: `(features, samples)`.
        state: hidden state and memory, each `(hidden, samples)`.

    Returns:
        The new state. It can be differentiated once.

    Example:
        >>> cell, inputs, zero = nn.LSTMCell(3, 4), torch.randn(3, 2), torch.zeros(4, 2)
        >>> hidden, memory = recur_columns(cell, inputs, (zero, zero))
        >>> bool(torch.allclose(hidden.mT, cell(inputs.mT)[0], atol=1e-6))
        True
    """
    hidden, memory = _Cell.apply(inputs, state[0], state[1], cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return hidden, memory


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, inputs: Tensor, hidden: Tensor, memory: Tensor, into: Tensor, back: Tensor, *biases: Tensor
    ) -> State:
        units = hidden.shape[0]
        joined = _joined(inputs, hidden)
        weights = torch.cat((into, back, (biases[0] + biases[1]).unsqueeze(1)), 1)
        tangent = slice(2 * units, 3 * units)
        weights[tangent] *= 2
        gates = torch.mm(weights, joined).sigmoid_()
        gates[tangent].mul_(2).sub_(1)
        enter, keep, new, leave = gates.split(units)
        memory = memory.contiguous()
        after = torch.addcmul(keep * memory, enter, new)
        # Of what fills memory the gates alone are new: the states are kept anyway.
        context.save_for_backward(inputs, hidden, memory, gates, after, weights)
        return leave * _tanh(after), after

    @staticmethod
    @once_differentiable
    def backward(context: Any, on_hidden: Tensor | None, on_memory: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, hidden, memory, gates, after, weights = context.saved_tensors
        units, features = memory.shape[0], inputs.shape[0]
        enter, keep, new, leave = gates.split(units)
        on_gates = torch.empty_like(gates)
        on_enter, on_keep, on_new, on_leave = on_gates.split(units)
        sigmoid, tanh = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input
        if on_hidden is None:
            assert on_memory is not None
            on_leave.zero_()
            total = on_memory
        else:
            on_hidden, bent = on_hidden.contiguous(), _tanh(after)
            sigmoid(on_hidden * bent, leave, grad_input=on_leave)
            total = torch.ops.aten.tanh_backward(on_hidden * leave, bent)
            total = total if on_memory is None else total.add_(on_memory)
        sigmoid(total * new, enter, grad_input=on_enter)
        sigmoid(total * memory, keep, grad_input=on_keep)
        tanh(total * enter, new, grad_input=on_new)
        on_weights = on_gates @ _joined(inputs, hidden).mT
        # The tangent's weights were doubled for the sigmoid; `on_new` is of what they were before.
        plain = weights.clone()
        plain[2 * units : 3 * units] /= 2
        on_bias = on_weights[:, -1]
        return (
            plain[:, :features].mT @ on_gates if context.needs_input_grad[0] else None,
            plain[:, features:-1].mT @ on_gates if context.needs_input_grad[1] else None,
            total * keep if context.needs_input_grad[2] else None,
            on_weights[:, :features],
            on_weights[:, features:-1],
            on_bias,
            on_bias.clone(),
        )


def _joined(inputs: Tensor, hidden: Tensor) -> Tensor:
    """All that the weights multiply, with a row of ones for the bias."""
    return torch.cat((inputs, hidden, hidden.new_ones(1, hidden.shape[1])))


def _tanh(tensor: Tensor) -> Tensor:
    return (2 * tensor).sigmoid_().mul_(2).sub_(1)
