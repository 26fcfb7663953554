"""The steps taken in a gauge, by hand: `metateleport.GaugedOptimizer`, for a whole stack of tasks at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method
from metateleport.families import TaskStack
from metateleport.gauges import Direction, GaugeKind, Sketches, directions_in_gauges, factor_pairs
from metateleport.gauges.whitened import SIDES
from metateleport.optim.gauged import BETAS, FLOOR, MATCHED, GaugedOptimizer

__all__ = ["RIVALS", "StackedGauged", "gauged"]


class StackedGauged(torch.optim.Optimizer):
    r"""`metateleport.GaugedOptimizer` on a stack whose parameters are all factors of pairs.

    Args:
        stack: the tasks.
        lr: step size.
        momentum: memory of the momentum.
        gauge: `whitening`, or `random` to compare with.
        rule: `polar` or `shampoo`.
    """

    def __init__(
        self,
        stack: TaskStack,
        lr: float,
        momentum: float = 0.9,
        gauge: GaugeKind = "whitening",
        rule: Direction = "polar",
    ) -> None:
        self.rule = rule
        self.tensors = {name: value for name, value in stack.tensors().items() if name in stack.names}
        self.pairs, self.gauge, self.steps = factor_pairs(stack.symmetries), gauge, 0
        super().__init__(self.tensors.values(), {"lr": lr, "momentum": momentum})
        none = {name: torch.zeros_like(value) for name, value in self.tensors.items()}
        memory = torch.full((len(stack),), BETAS[rule][1], dtype=next(iter(none.values())).dtype, device=stack.device)
        places = [(number, side) for number in range(len(self.pairs)) for side in SIDES]
        self._sketches = Sketches(none, dict.fromkeys(places, memory), {}) if rule == "shampoo" else None
        model = dict(stack.template.named_parameters())
        self._lengths, self._factors = [], {}
        for pair in self.pairs:
            rows = [sum(model[name].numel() for name in pair.names(side)) // pair.size for side in SIDES]
            self._lengths.append(MATCHED * math.sqrt(max(rows)))
            self._factors.update({name: self._lengths[-1] for side in SIDES for name in pair.names(side)})

    @staticmethod
    def serves(stack: nn.Module) -> bool:
        """Whether every parameter that is trained is a factor of one pair."""
        if not isinstance(stack, TaskStack):
            return False
        names = [name for pair in factor_pairs(stack.symmetries) for side in SIDES for name in pair.names(side)]
        return sorted(names) == sorted(stack.names)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        self.steps += 1
        rate, memory = float(group["lr"]), group["momentum"]
        covectors = {}
        for name, value in self.tensors.items():
            assert value.grad is not None
            kept = self.state[value].setdefault("momentum", torch.zeros_like(value))
            kept.copy_(torch.lerp(value.grad, kept, memory))
            covectors[name] = torch.lerp(value.grad, kept, memory) / (1 - memory ** (self.steps + 1))
        floors = [FLOOR * rate * length for length in self._lengths]
        parameters = {name: value.detach() for name, value in self.tensors.items()}
        if self._sketches is not None:
            self._sketches.gradients = {name: _known(value.grad) for name, value in self.tensors.items()}
        found = directions_in_gauges(
            self.rule, self.pairs, parameters, covectors, floors, kind=self.gauge, sketches=self._sketches
        )
        for name, direction in found.items():
            self.tensors[name].sub_(direction, alpha=self._factors[name] * rate)
        return loss


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def gauged(model: nn.Module, lr: float, momentum: float = 0.9, rule: Direction = "polar") -> torch.optim.Optimizer:
    """`GaugedOptimizer` with whitening gauges, on a stack of tasks or on one task's model.

    Args:
        model: the stack or the model.
        lr: step size.
        momentum: memory of the momentum.
        rule: `polar` or `shampoo`.
    """
    if isinstance(model, TaskStack):
        return StackedGauged(model, lr, momentum, rule=rule)
    return GaugedOptimizer(model, rule=rule, lr=lr, betas=(momentum, BETAS[rule][1]))


def _gauged(name: str, rule: Direction, **settings: Any) -> Method:
    return Scheduled(name, gauged, stacked=StackedGauged.serves, rule=rule, **settings)


def _rival(name: str, rule: Direction, memories: tuple[float, ...]) -> Rival:
    return Rival(
        name,
        functools.partial(_gauged, name, rule),
        Lattice(-4, -1),
        {"decay": Choice(DECAYS), "momentum": Choice(memories)},
        on_request=True,
        fair=True,
        needs="LoRA pair",
    )


RIVALS = (_rival("gauged", "polar", (0.9, 0.8, 0.95)), _rival("gauged-shampoo", "shampoo", (0.8, 0.9)))
