"""Gradient descent along a learned schedule of two numbers: a first step and the power that it falls with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from metateleport.gauges import Gauge
from metateleport.learned.progress import Progress
from metateleport.learned.rules.base import RuleSettings, UpdateRule
from metateleport.linalg import fit
from metateleport.point import Point, Tensors
from metateleport.settings import POSITIVE, setting
from metateleport.symmetries import Symmetry

__all__ = ["ScheduleRule", "ScheduleSettings"]

_PERIOD = 100.0
"""Steps after which the schedule has fallen by the power of two."""


class ScheduleRule(nn.Module, UpdateRule):
    r"""Steps $w \mapsto w - e^a (1 + t / 100)^{-b}\, G$ with learned $a$ and $b$, damped after steps taken back.

    Args:
        lr: the step that it starts from, $e^a$; $b$ starts at zero.

    Source: Wu, Ren, Liao and Grosse, "Understanding short-horizon bias in stochastic meta-optimization", ICLR 2018
    (arXiv 1803.02021), section 2.3, for a schedule of two numbers.
    """

    rows_by_task: ClassVar[bool] = True

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.numbers = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.numbers.weight.copy_(torch.tensor([[math.log(lr)], [0.0]]))

    def initial_state(self, point: Point) -> dict[str, Any]:
        return {"time": 0}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: dict[str, Any],
        gauges: Sequence[Gauge] = (),
        spend: bool = False,
    ) -> tuple[Tensors, dict[str, Any]]:
        assert point.loss is not None
        one = torch.ones_like(point.loss).unsqueeze(-1).to(self.numbers.weight.dtype)
        log_lr, power = self.numbers(one).to(point.loss.dtype).unbind(-1)
        length = (log_lr - power * math.log1p(state["time"] / _PERIOD)).exp() * progress.damping
        moved = {
            name: point.parameters[name] - fit(length, gradient) * gradient
            for name, gradient in point.gradients.items()
        }
        return {**point.parameters, **moved}, {"time": state["time"] + 1}


@dataclasses.dataclass(frozen=True)
class ScheduleSettings(RuleSettings):
    """A learned schedule of two numbers (`ScheduleRule`).

    Args:
        lr: the step that it starts from.
    """

    kind: ClassVar[str] = "schedule"

    lr: float = setting(0.1, POSITIVE)

    def rule(self) -> ScheduleRule:
        return ScheduleRule(self.lr)
