"""Gradient ascent on the group element that is itself differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metateleport.objectives import Objective, SquaredGradientNorm
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Teleporter, TrustRegion

__all__ = ["UnrolledAscentTeleporter"]


class UnrolledAscentTeleporter(Teleporter):
    r"""Gradient ascent on an objective $J$ over the generator, kept in the graph of the point it starts from.

    The steps are those of `GradientAscentTeleporter`. There the element is a constant of the meta-gradient; here
    $T(w)$ is differentiated too, which needs one more derivative of the task's loss than the objective. Use it in
    inner loops with `through_choice=True`; elsewhere it only costs memory.

    Args:
        objective: what to raise; the squared norm of the gradient if not given.
        steps: number of ascent steps, at least one.
        step_size: length of the first step in the Lie algebra; negative to descend.
        cap: largest Frobenius norm of the generator.
        trust_region: bounds on each teleport.

    Raises:
        ValueError: if there are no steps, or the cap is not positive.

    Example:
        >>> UnrolledAscentTeleporter(steps=2, step_size=0.5).name
        'unrolled-ascent'

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), algorithm 1, for the ascent.
    """

    name = "unrolled-ascent"
    needs_gradient = True

    def __init__(
        self,
        objective: Objective | None = None,
        steps: int = 1,
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
        tiny = torch.finfo(weight.dtype).tiny
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            chosen = weight.new_zeros(*batch, *group.shape).requires_grad_()
            first: Tensor | None = None
            for _ in range(self.steps):
                values = self.objective(symmetry.act(group.exp(chosen), point))
                (slope,) = torch.autograd.grad(values.sum(), chosen, create_graph=keep, retain_graph=True)
                if first is None:
                    first = group.norm(slope).clamp_min(tiny)
                chosen = chosen + self.step_size * slope / group.expand(first)
                norm = group.norm(chosen).clamp_min(tiny)
                chosen = chosen * group.expand((self.cap / norm).clamp_max(1.0))
        return chosen if keep else chosen.detach(), state
