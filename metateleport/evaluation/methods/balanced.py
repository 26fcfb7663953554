"""AdamW with a teleport that stays: every few steps both factors of each adapter are made alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method
from metateleport.families import TaskStack
from metateleport.point import Point
from metateleport.teleporters import WhiteningTeleporter, travel

__all__ = ["RIVALS", "BalancedAdamW", "balanced_adamw"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class BalancedAdamW(torch.optim.AdamW):
    r"""AdamW without weight decay on a stack; every k steps the factors of its adapters move along their orbits.

    The element is the one that makes both factors alike, $g A A^\top g = g^{-1} B^\top B g^{-1}$
    (`metateleport.WhiteningTeleporter("balanced")`), and nothing is undone: the next steps are AdamW's own, from there.
    The first moment is a covector and moves along exactly. The second moments move along as if entries were
    uncorrelated. Choosing the element costs no evaluation.

    Args:
        stack: the tasks.
        lr: step size.
        beta2: memory of the second moments.
        every: k, steps between two teleports. The first is after k steps, when B has left zero.

    Source: Kingma and Ba, ICLR 2015 (arXiv 1412.6980); Tong, Ma and Chi, JMLR 2021 (arXiv 2005.08898), on balanced
    factors.
    """

    def __init__(self, stack: TaskStack, lr: float, beta2: float = 0.999, every: int = 10) -> None:
        tensors = stack.tensors()
        self.tensors = {name: tensors[name] for name in stack.names}
        self.symmetries, self.every, self.steps = stack.symmetries, every, 0
        self.tasks, self.device = len(stack), stack.device
        self.teleporter = WhiteningTeleporter("balanced")
        super().__init__(list(self.tensors.values()), lr=lr, betas=(0.9, beta2), weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            self._teleport()
        return loss

    def _teleport(self) -> None:
        # In the double precision that the elements' condition needs: B is small beside A at first.
        parameters = {name: value.detach().double() for name, value in self.tensors.items()}
        # A loss says that there is a task dimension; the element does not depend on it.
        point = Point(parameters, loss=torch.zeros(self.tasks, dtype=torch.float64, device=self.device))
        arrived, moves, _ = travel(self.teleporter, point, self.symmetries)
        first, second = (
            {name: self.state[value][key].double() for name, value in self.tensors.items()} for key in _MOMENTS
        )
        for move in moves:
            first.update(move.symmetry.carry_covectors(move.element, first, point).tensors)
            second.update(move.symmetry.carry_squares(move.element, second, point).tensors)
        for name, value in self.tensors.items():
            value.copy_(arrived.parameters[name])
            for key, moments in zip(_MOMENTS, (first, second), strict=True):
                self.state[value][key].copy_(moments[name])


def balanced_adamw(model: nn.Module, lr: float, beta2: float = 0.999, every: int = 10) -> torch.optim.Optimizer:
    """`BalancedAdamW` on a stack of tasks."""
    assert isinstance(model, TaskStack)
    return BalancedAdamW(model, lr, beta2, every)


class _Balanced(Scheduled):
    teleports = True

    def __init__(self, **settings: Any) -> None:
        super().__init__("balanced-adamw", balanced_adamw, **settings)
        self.moves_by = "stays"


def _balanced(**settings: Any) -> Method:
    return _Balanced(**settings)


RIVALS = (
    Rival(
        "balanced-adamw",
        _balanced,
        Lattice(-4, -1),
        {"decay": Choice(DECAYS), "beta2": Choice((0.999, 0.95)), "every": Choice((10, 1))},
        on_request=True,
        needs="LoRA pair",
    ),
)
