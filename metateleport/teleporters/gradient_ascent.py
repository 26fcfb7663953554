"""The source papers' hand-designed teleporter: ascend an objective over the group element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metateleport.objectives import Objective, SquaredGradientNorm
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Teleporter, TrustRegion

__all__ = ["GradientAscentTeleporter"]


class GradientAscentTeleporter(Teleporter):
    r"""Gradient ascent on an objective $J$ over the generator of the group element.

    $$T_0 = 0, \qquad T_{m+1} = T_m + \eta\, \frac{\nabla_T J(\exp(T_m) \cdot w)}{|\nabla_T J(w)|},$$

    after each step scaled back to $|T| \le$ `cap`. Dividing by the first gradient's norm makes the step size a
    length in the Lie algebra, whatever the scale of the loss; later steps shrink with the gradient.

    Args:
        objective: what to raise.
        steps: number of ascent steps, at least one.
        step_size: $\eta$; negative to descend.
        cap: largest Frobenius norm of the generator.
        trust_region: bounds on what is carried out.

    Raises:
        ValueError: if there are no steps, or the cap is not positive.

    Example:
        >>> GradientAscentTeleporter(steps=5, step_size=0.1).name
        'gradient-ascent'

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), algorithm 1.
    """

    name = "gradient-ascent"
    needs_gradient = True

    def __init__(
        self,
        objective: Objective | None = None,
        steps: int = 10,
        step_size: float = 0.1,
        cap: float = 1.0,
        trust_region: TrustRegion | None = None,
    ) -> None:
        super().__init__(trust_region)
        if steps < 1:
            raise ValueError(f"gradient ascent needs at least one step, not {steps!r}")
        if not cap > 0:
            raise ValueError(f"the cap is the largest norm of a generator and has to be positive, not {cap!r}")
        self.objective = objective or SquaredGradientNorm()
        self.steps, self.step_size, self.cap = steps, step_size, cap

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        return self.steps * self.objective.evaluations(symmetry, point)

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        group = symmetry.group
        weight = point.parameters[symmetry.parameters[0]]
        batch = () if point.loss is None else point.loss.shape
        chosen = weight.new_zeros(*batch, *group.shape)
        fixed = point.detach().replace(pullback=point.pullback)
        first: Tensor | None = None
        for _ in range(self.steps):
            with torch.enable_grad():
                trial = chosen.detach().requires_grad_()
                values = self.objective(symmetry.act(group.exp(trial), fixed))
                (slope,) = torch.autograd.grad(values.sum(), trial)
            if first is None:
                first = group.norm(slope).clamp_min(torch.finfo(slope.dtype).tiny)
            chosen = chosen + self.step_size * slope / group.expand(first)
            norm = group.norm(chosen).clamp_min(torch.finfo(slope.dtype).tiny)
            chosen = chosen * group.expand((self.cap / norm).clamp_max(1.0))
        return chosen.detach(), state
