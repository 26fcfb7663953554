"""Gradient ascent on an objective over the group element, the source papers' hand-designed teleporter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metateleport.objectives import Objective, SquaredGradientNorm
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters._ascent import Ascent, Direction, differentiated
from metateleport.teleporters.base import Chosen, Teleporter, TrustRegion
from metateleport.teleporters.simple import no_motion

__all__ = ["GradientAscentTeleporter"]


class GradientAscentTeleporter(Teleporter):
    r"""Gradient ascent, or descent, on an objective $J$ over the group element.

    $$g_0 = 1, \qquad g_{m+1} = \exp\left(\pm \eta\, \frac{D_m}{|D_0|}\right) g_m, \qquad
      D_m = \nabla_S\, J(\exp(S)\, g_m \cdot w) \text{ at } S = 0,$$

    until the steps together are `cap` long. Dividing by the first gradient's norm makes the step size a length in the
    Lie algebra, whatever the scale of the loss; later steps shrink with the gradient. In GL(k) a short step is taken as
    $1 + S$, so that a step costs no exponential and no derivative of one; the action inverts what comes out exactly.

    Args:
        objective: what to raise or lower; the squared gradient norm if not given.
        steps: number of steps, at least one.
        step_size: $\eta$, positive; with a line search that of the first step.
        cap: largest length of the way, the Frobenius norms of all steps together.
        trust_region: bounds on each teleport.
        direction: `ascent` or `descent`.
        line_search: tries five multiples of the last step size in every step, and takes the best, or stays if none is
            better. A value costs a third of a value with its gradient.
        value_cap: where the objective is above it, no further step is made (the papers' cap).

    Raises:
        ValueError: if there are no steps, or the step size or the cap is not positive.

    Example:
        >>> GradientAscentTeleporter(steps=5, step_size=0.1).name
        'gradient-ascent'
        >>> GradientAscentTeleporter(direction="descent").name
        'gradient-descent'

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), algorithm 1; for sharpness and curvature Zhao et al., ICLR
    2024 (arXiv 2305.13404), section 4. Their code moves all pairs of layers in each step; here one symmetry is done
    after the other.
    """

    needs_gradient = True

    def __init__(
        self,
        objective: Objective | None = None,
        steps: int = 10,
        step_size: float = 0.1,
        cap: float = 1.0,
        trust_region: TrustRegion | None = None,
        direction: Direction = "ascent",
        line_search: bool = False,
        value_cap: float | None = None,
    ) -> None:
        super().__init__(trust_region)
        self.ascent = Ascent(steps, step_size, cap, direction, line_search, value_cap)
        self.objective = objective or SquaredGradientNorm()
        self.needs_loss = self.objective.needs_loss
        self.name = f"gradient-{direction}"

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        """The cost of all steps; an ascent that stops earlier is charged only for the steps it made."""
        return self.ascent.cost(self.objective.evaluations(symmetry, point))

    def gain_evaluations(self, symmetry: Symmetry, point: Point) -> float:
        # Where the gradient has arrived the objective is known; any other is looked at once more at both ends.
        return 0.0 if self.objective.reads_gradients else 2 * self.objective.evaluations(symmetry, point) / 3

    def gain(self, start: Point, arrived: Point) -> Tensor:
        with torch.no_grad():
            return self.ascent.relative_gain(self.objective(start.detach()), self.objective(arrived.detach()))

    def choose(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Chosen, Any]:
        fixed = point.detach()
        if self.objective.reads_gradients:
            fixed = fixed.replace(pullback=point.pullback)
        else:
            # Without them nothing of a backward pass is rebuilt.
            fixed = fixed.replace(cotangents={})
        like = no_motion(symmetry, point)
        batch = like.shape[: like.ndim - len(symmetry.group.shape)]
        one = symmetry.group.identity(*batch, dtype=like.dtype, device=like.device)
        act = symmetry.action_at(fixed, gradients_only=not self.objective.reads_parameters)
        evaluate = differentiated(symmetry.group, lambda element: self.objective(act(element)))
        element, size, spent = self.ascent.run(symmetry.group, one, evaluate)
        return Chosen(element, size, spent * self.objective.evaluations(symmetry, point)), state
