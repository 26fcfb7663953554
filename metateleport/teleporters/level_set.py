"""Level set teleportation: the largest gradient norm at the same loss, by Hessian-vector products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metateleport.point import Point, Tensors
from metateleport.teleporters.base import TrustRegion
from metateleport.teleporters.free import Displaced, Displacement, FreeTeleporter, gradients_at

__all__ = ["LevelSetTeleporter"]

# Share of the predicted rise that is enough, shrinking of the step, and how far the penalty is above the multiplier.
_ENOUGH, _SHRINK, _PENALTY = 0.25, 0.5, 1.1


class LevelSetTeleporter(FreeTeleporter):
    r"""Maximises $\tfrac12 \log |\nabla L|^2$ on the level set $L(x) = L(w)$, by sequential linear programs.

    With $g = \nabla L(x)$ and $u = \nabla^2 L(x)\, g / |g|^2$, the gradient of the objective, a step goes along $u$ and
    then, by a linearised projection, back to the level set:

    $$x^+ = x + \rho u - \frac{\rho\, \langle u, g \rangle + L(x) - L(w)}{|g|^2}\, g.$$

    $\rho$ is halved until the merit function $\log |g| - \gamma\, |L(x) - L(w)|$ rises enough. At the end more
    projections, without $u$, bring the loss back to what it was. Only the loss on this batch is kept: the outputs
    change, and so does the loss on other batches.

    Args:
        steps: number of steps, at least one; each costs a Hessian-vector product, 2 gradient evaluations, and one for
            every point that is tried.
        step_size: length of the first $\rho u$ over the norm of the weights.
        line_search: whether $\rho$ is searched for; otherwise it stays.
        backtracks: largest number of tries for one step.
        projections: largest number of projections at the end.
        tolerance: relative change of the loss at which they stop.
        trust_region: bounds on each teleport; `max_drift` applies to the loss.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> bowl = lambda w: (w["w"] * w["w"] * torch.tensor([1.0, 4.0]).double()).sum() / 2
        >>> w = torch.tensor([1.0, 0.5]).double()
        >>> point = Point({"w": w}, {"w": w * torch.tensor([1.0, 4.0])}, loss=bowl({"w": w}), loss_at=bowl)
        >>> from metateleport.teleporters import travel
        >>> arrived, _, _ = travel(LevelSetTeleporter(steps=50), point, ())
        >>> arrived.parameters["w"].abs().round(decimals=2)
        tensor([0.0000, 0.7100], dtype=torch.float64)

    Source: Mishkin, Bietti and Gower, 2024 (arXiv 2403.03362), section 5, in the normalised form of their code.
    """

    name = "level-set"
    keeps = "loss"

    def __init__(
        self,
        steps: int = 10,
        step_size: float = 0.1,
        line_search: bool = True,
        backtracks: int = 10,
        projections: int = 5,
        tolerance: float = 1e-8,
        trust_region: TrustRegion | None = None,
    ) -> None:
        super().__init__(trust_region)
        if min(steps, backtracks) < 1 or projections < 0:
            raise ValueError(
                f"level set teleportation needs at least one step and one try, and projections of zero or more, not "
                f"steps={steps!r}, backtracks={backtracks!r}, projections={projections!r}"
            )
        if not 0 < step_size < math.inf or not tolerance >= 0:
            raise ValueError(
                f"the step size is positive and the tolerance at least zero, not {step_size!r} and {tolerance!r}"
            )
        self.steps, self.step_size, self.line_search = steps, step_size, line_search
        self.backtracks, self.projections, self.tolerance = (backtracks if line_search else 1), projections, tolerance

    def displace(self, point: Point) -> Displaced:
        assert point.loss is not None
        batch = point.loss.ndim
        moving = Displacement({name: point.parameters[name].shape[batch:] for name in point.gradients})
        search = _Search(point, moving)
        rho: Tensor | None = None
        for _ in range(self.steps):
            rho = self._step(search, rho)
        for _ in range(self.projections):
            off = (search.loss - search.level).abs() > self.tolerance * search.level.abs()
            if not bool(off.any()):
                break
            squared = _dot(search.gradient, search.gradient)
            back = -((search.loss - search.level) / squared).unsqueeze(-1) * search.gradient
            search.move(search.x + back, off & (squared > 0))
        gradients = moving.split(search.gradient)
        return Displaced(moving, search.x - search.origin, search.loss, gradients, search.spent)

    def _step(self, search: _Search, rho: Tensor | None) -> Tensor:
        g, gap = search.gradient, search.loss - search.level
        squared = _dot(g, g)
        active = (squared > 0) & squared.isfinite() & search.loss.isfinite()
        safe = torch.where(active, squared, 1.0)
        uphill = search.hessian_times_gradient(active) / safe.unsqueeze(-1)
        along = _dot(uphill, g)
        if rho is None:
            tiny = torch.finfo(g.dtype).tiny
            rho = self.step_size * _norm(search.x) / _norm(uphill).clamp_min(tiny)
        # A penalty above the multiplier of the constraint makes the constrained maximum one of the merit function.
        penalty = _PENALTY * along.abs() / safe
        merit_here, searching = safe.log() / 2 - penalty * gap.abs(), active
        before, at_once = rho, torch.zeros_like(active)
        for _ in range(self.backtracks):
            back = (rho * along + gap) / safe
            proposed = search.x + rho.unsqueeze(-1) * uphill - back.unsqueeze(-1) * g
            loss, gradient = search.evaluate(proposed, searching)
            gained = _dot(gradient, gradient)
            merit = gained.log() / 2 - penalty * (loss - search.level).abs()
            predicted = _dot(uphill, proposed - search.x) + penalty * gap.abs()
            wanted = merit_here + _ENOUGH * predicted
            good = torch.isfinite(merit) & torch.isfinite(loss) & ((merit >= wanted) | (not self.line_search))
            search.take(proposed, loss, gradient, searching & good)
            at_once = at_once | (good & (rho == before))
            searching = searching & ~good
            if not self.line_search or not bool(searching.any()):
                break
            rho = torch.where(searching, rho * _SHRINK, rho)
        # A step size that was good at once may be too small.
        return torch.where(active & at_once & self.line_search, rho / _SHRINK, rho)


class _Search:
    """The tasks' flat parameters, and the evaluations spent."""

    def __init__(self, point: Point, moving: Displacement) -> None:
        assert point.loss is not None
        self.point, self.moving = point, moving
        self.level = self.loss = point.loss
        batch = point.loss.ndim
        self.origin = self.x = moving.flatten(point.parameters, batch)
        self.gradient = moving.flatten(point.gradients, batch)
        self.spent = torch.zeros_like(point.loss)

    def parameters(self, x: Tensor) -> Tensors:
        return self.moving.split(x)

    def evaluate(self, x: Tensor, charged: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradients = gradients_at(self.point, self.parameters(x))
        self.spent = self.spent + charged.to(self.spent.dtype)
        return loss, self.moving.flatten(gradients, loss.ndim)

    def hessian_times_gradient(self, charged: Tensor) -> Tensor:
        """Half the gradient of the squared gradient norm: a Hessian-vector product."""
        with torch.enable_grad():
            x = self.x.detach().requires_grad_()
            _, gradients = gradients_at(self.point, self.parameters(x), in_graph=True)
            squared = self.moving.flatten(gradients, self.loss.ndim).square().sum() / 2
            (product,) = torch.autograd.grad(squared, x)
        self.spent = self.spent + 2 * charged.to(self.spent.dtype)
        return product

    def take(self, x: Tensor, loss: Tensor, gradient: Tensor, where: Tensor) -> None:
        self.x = torch.where(where.unsqueeze(-1), x, self.x)
        self.loss = torch.where(where, loss, self.loss)
        self.gradient = torch.where(where.unsqueeze(-1), gradient, self.gradient)

    def move(self, x: Tensor, where: Tensor) -> None:
        loss, gradient = self.evaluate(x, where)
        nearer = (loss - self.level).abs() < (self.loss - self.level).abs()
        self.take(x, loss, gradient, where & nearer)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
