"""Networks of several meta-seeds stacked, so that one unroll trains all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.learned import MetaOptimizer

__all__ = ["SeedStack", "stack_seeds", "unstack_seeds"]


class SeedStack(nn.Module):
    """Several copies of one linear layer or LSTM cell, each for its own part of a stack of tasks.

    The first dimension of every input holds the tasks of the first copy, then those of the second, and so on, as many
    for each.

    Args:
        copies: of `nn.Linear` or `nn.LSTMCell`, of one shape.

    Example:
        >>> stack = SeedStack([nn.Linear(3, 2), nn.Linear(3, 2)])
        >>> x = torch.randn(10, 3)
        >>> torch.allclose(stack(x)[5:], stack.copy(1)(x[5:]), atol=1e-6)
        True
    """

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        # In a list, so that it is no child of this module: it tells the shape, and its weights are not used.
        self._template = [copy.deepcopy(copies[0])]
        self.count = len(copies)
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
        parts = inputs.reshape(self.count, -1, inputs.shape[-1])
        weights, biases = self.get_parameter(weight), self.get_parameter(bias)
        return torch.baddbmm(biases.unsqueeze(1), parts, weights.mT).flatten(0, 1)


def stack_seeds(metas: Sequence[MetaOptimizer]) -> MetaOptimizer:
    """One meta-optimizer of several with the source paper's networks, that serves a stack of as many equal parts."""
    whole = copy.deepcopy(metas[0])
    for name, module in metas[0].named_modules():
        if isinstance(module, nn.LSTMCell | nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, SeedStack([each.get_submodule(name) for each in metas]))
    return whole


def unstack_seeds(whole: MetaOptimizer) -> list[MetaOptimizer]:
    """The meta-optimizers that `stack_seeds` was given, as they are now."""
    stacks = {name: each for name, each in whole.named_modules() if isinstance(each, SeedStack)}
    metas = []
    for number in range(next(iter(stacks.values())).count):
        meta = copy.deepcopy(whole)
        for name, each in stacks.items():
            parent, _, child = name.rpartition(".")
            setattr(meta.get_submodule(parent), child, each.copy(number))
        metas.append(meta)
    return metas
