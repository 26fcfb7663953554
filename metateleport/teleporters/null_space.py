"""Weight steps in the null space of the layers' inputs, which leave the outputs on the batch unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metateleport.objectives import Objective, SquaredGradientNorm
from metateleport.point import Point, Tensors
from metateleport.teleporters._ascent import Ascent, Direction, differentiated
from metateleport.teleporters.base import TrustRegion
from metateleport.teleporters.free import Displaced, Displacement, FreeTeleporter, gradients_at

__all__ = ["NullSpaceTeleporter", "null_projection"]


class NullSpaceTeleporter(FreeTeleporter):
    r"""Ascent of an objective over weight steps in the null space of every layer's inputs.

    $$W_l \mapsto W_l + \Delta_l (1 - P_l), \qquad P_l = \text{projection onto the span of the inputs of layer } l,$$

    so that the outputs of every layer on the batch are unchanged. All layers move at once, with projections computed
    once. Linear layers and convolutions move, the latter along their input channels, alike at all positions of the
    kernel. Biases stay, and so do layers whose inputs span all of their input features.

    Args:
        objective: what to raise; the squared gradient norm if not given.
        steps: number of steps, at least one.
        step_size: length of the first step over the norm of the weights that move, positive.
        cap: largest length of all steps together over that norm.
        energy: share of the inputs' squared norm whose span is kept; 1 keeps all but rounding, less lets the outputs
            drift for more room.
        trust_region: bounds on each teleport.
        direction: `ascent` or `descent`.
        line_search: tries five multiples of the last step size in every step, and takes the best, or none.
        value_cap: where the objective is above it, no further step is made.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> NullSpaceTeleporter(steps=5).needs_symmetries
        False

    Source: Wu, Dong, Aloui and Tarokh, 2025 (arXiv 2502.11362), where the energy is the threshold tau, and the null
    space of a convolution is that of its patches, which contains the one taken here.
    """

    name = "null-space"

    def __init__(
        self,
        objective: Objective | None = None,
        steps: int = 10,
        step_size: float = 0.1,
        cap: float = 1.0,
        energy: float = 1.0,
        trust_region: TrustRegion | None = None,
        direction: Direction = "ascent",
        line_search: bool = False,
        value_cap: float | None = None,
    ) -> None:
        super().__init__(trust_region)
        if not 0 < energy <= 1:
            raise ValueError(f"energy is the kept share of the inputs' squared norm, above 0 up to 1, not {energy!r}")
        self.ascent = Ascent(steps, step_size, cap, direction, line_search, value_cap)
        self.objective = objective or SquaredGradientNorm()
        self.energy = energy

    def watches(self, model: nn.Module) -> tuple[str, ...]:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return tuple(name for name, module in model.named_modules() if isinstance(module, kinds))

    def displace(self, point: Point) -> Displaced:
        assert point.loss is not None
        batch = point.loss.ndim
        projections = self._projections(point, batch)
        moving = Displacement({name: point.parameters[name].shape[batch:] for name in projections or point.gradients})
        zero = torch.zeros_like(point.loss)
        if not projections:
            still = zero.new_zeros(*zero.shape, moving.group.size)
            return Displaced(moving, still, point.loss, point.gradients, zero)
        # Of stacked tasks only the weights that have room count, as if each were alone.
        room = {name: _has_room(projection) for name, projection in projections.items()}
        able = {name: point.parameters[name] * _over(room[name], point.parameters[name]) for name in projections}
        scale = torch.linalg.vector_norm(moving.flatten(able, batch), dim=-1, keepdim=True)

        def unseen(relative: Tensor) -> Tensors:
            steps = moving.split(relative * scale)
            return {name: _project(step, projections[name], batch) for name, step in steps.items()}

        def objective(relative: Tensor) -> Tensor:
            moved = {name: point.parameters[name] + step for name, step in unseen(relative).items()}
            there = point.replace(parameters={**point.parameters, **moved}, pullback=None)
            if self.objective.reads_gradients:
                loss, gradients = gradients_at(point, moved, in_graph=True)
                there = there.replace(loss=loss, gradients=gradients)
            return self.objective(there)

        slope = 2.0 if self.objective.reads_gradients else self.objective.evaluations(moving, point)
        start = scale.new_zeros(*zero.shape, moving.group.size)
        arrived_at = self.ascent.run(moving.group, start, differentiated(moving.group, objective))
        step = moving.flatten(unseen(arrived_at.element), batch)
        arrived = {name: point.parameters[name] + part for name, part in moving.split(step).items()}
        loss, gradients = gradients_at(point, arrived)
        # One gradient evaluation at the new place; an objective of another kind is looked at once more at both ends.
        looked = 1.0 if self.objective.reads_gradients else 1.0 + 2 * slope / 3
        return Displaced(moving, step, loss, gradients, slope * arrived_at.spent + looked)

    def gain(self, start: Point, arrived: Point) -> Tensor:
        with torch.no_grad():
            return self.ascent.relative_gain(self.objective(start), self.objective(arrived))

    def activations_after(self, start: Point, moved: Displacement) -> Tensors:
        return start.activations

    def _projections(self, point: Point, batch: int) -> Tensors:
        """The projection onto the null space of its inputs, for every weight that has one."""
        found = {}
        for module, rows in point.activations.items():
            name = f"{module}.weight" if module else "weight"
            weight = point.parameters.get(name)
            if name not in point.gradients or weight is None or weight.ndim < batch + 2:
                continue
            # A grouped convolution and an embedding see their input in another way.
            if weight.shape[batch + 1] != rows.shape[-1]:
                continue
            projection = null_projection(rows, self.energy)
            if bool(_has_room(projection).any()):
                found[name] = projection
        return found


def null_projection(rows: Tensor, energy: float = 1.0) -> Tensor:
    """Projection onto the complement of the span of some inputs, `(*batch, features, features)`.

    Args:
        rows: inputs, `(*batch, samples, features)`; a task with one that is not finite gets the projection zero.
        energy: share of their squared norm that has to be spanned.

    Example:
        >>> null_projection(torch.tensor([[2.0, 0.0]])).round()
        tensor([[0., 0.],
                [0., 1.]])
    """
    finite = rows.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    _, triangle = torch.linalg.qr(torch.where(finite, rows, 0.0), mode="r")
    _, singular, vectors = torch.linalg.svd(triangle, full_matrices=True)
    missing = rows.shape[-1] - singular.shape[-1]
    squares = torch.nn.functional.pad(singular.square(), (0, missing))
    total = squares.sum(-1, keepdim=True)
    above = squares.cumsum(-1) - squares
    rounding = (torch.finfo(rows.dtype).eps * max(rows.shape[-2:])) ** 2
    unseen = (squares <= rounding * squares[..., :1]) | (above >= energy * total)
    unseen = unseen & finite.squeeze(-1)
    return (vectors.mT * unseen.unsqueeze(-2)) @ vectors


def _has_room(projection: Tensor) -> Tensor:
    return (torch.diagonal(projection, dim1=-2, dim2=-1) > 0).any(-1)


def _over(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def _project(step: Tensor, projection: Tensor, batch: int) -> Tensor:
    """A weight's step projected onto the null space, along the input axis."""
    moved = step.movedim(batch + 1, -1)
    shape = moved.shape
    moved = moved.reshape(*shape[:batch], -1, shape[-1]) @ projection
    return moved.reshape(shape).movedim(-1, batch + 1)
