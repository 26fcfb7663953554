"""Teleporters that move the weights along no symmetry; reports and optimizers treat their moves like others."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.symmetries.base import Carried
from metateleport.symmetries.translation import Translation
from metateleport.teleporters.base import Move, Teleporter, gainless, reasons
from metateleport.teleporters.failures import NO_GAIN, UNSTABLE, add_failure

__all__ = ["Displaced", "Displacement", "FreeTeleporter", "gradients_at"]


class Displacement(Symmetry):
    r"""The move $w \mapsto w + \Delta$ of some parameters, flattened, as if it were a symmetry.

    It leaves the outputs or the loss unchanged only for the $\Delta$ that the teleporter chose. As a symmetry it
    appears in reports, can be undone, and names the parameters whose optimizer state is kept.

    Args:
        shapes: of one model's parameters, by name.

    Example:
        >>> Displacement({"w": torch.Size([2, 3])}).group
        Translation(6)
    """

    kind = "displacement"
    exactness = "approximate"

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self.parameters = tuple(self.shapes)
        self.group: Translation = Translation(sum(shape.numel() for shape in self.shapes.values()))

    def act(self, element: Tensor, point: Point) -> Point:
        moved = {name: point.parameters[name] + step for name, step in self.split(element).items()}
        return point.update(moved, stale=point.stale | frozenset(point.gradients)).replace(pullback=None)

    def split(self, element: Tensor) -> Tensors:
        """The flat `(*batch, size)` step of every parameter, by name."""
        parts = element.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape(*part.shape[:-1], *self.shapes[name])
            for name, part in zip(self.shapes, parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor], batch: int) -> Tensor:
        """Tensors shaped like the parameters as one `(*batch, size)` vector."""
        return torch.cat([tensors[name].reshape(*tensors[name].shape[:batch], -1) for name in self.shapes], -1)

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        return Carried({name: covectors[name] for name in self.parameters if name in covectors}, exact=False)

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        return self.carry_covectors(element, squares, point)


class Displaced(NamedTuple):
    """What a free teleporter proposes; tensors are `(*batch,)` but for the step.

    Args:
        symmetry: the displacement, which names the parameters.
        step: flat, `(*batch, size)`.
        loss: the loss at the new place.
        gradients: the gradients there.
        evaluations: gradient evaluations that finding it cost, those of the new gradients included.
    """

    symmetry: Displacement
    step: Tensor
    loss: Tensor
    gradients: Tensors
    evaluations: Tensor


class FreeTeleporter(Teleporter):
    """Moves the weights along no symmetry; it needs only the loss as a function.

    Args:
        trust_region: bounds on each teleport; `max_drift` applies to the loss too, task by task.
    """

    needs_gradient = True
    needs_loss = True
    needs_symmetries = False

    @abc.abstractmethod
    def displace(self, point: Point) -> Displaced:
        """Chooses the displacement.

        Args:
            point: where the model stands, with gradients and `loss_at`.
        """

    def gain(self, start: Point, arrived: Point) -> Tensor:
        before, after = start.squared_gradient_norm(), arrived.squared_gradient_norm()
        return (after - before) / before.clamp_min(torch.finfo(before.dtype).tiny)

    def travel(
        self, point: Point, symmetries: Sequence[Symmetry], state: Any, allowed: Tensor | None
    ) -> tuple[Point, list[Move], Any]:
        assert point.loss is not None
        start = point.detach()
        found = self.displace(start)
        step, region, loss = found.step.detach(), self.trust_region, point.loss.detach()
        size = torch.linalg.vector_norm(step, dim=-1)
        finite = size.isfinite() & found.loss.isfinite()
        for value in found.gradients.values():
            finite = finite & value.reshape(*size.shape, -1).isfinite().all(-1)
        within = size <= region.max_size
        change = (found.loss - loss).abs() / loss.abs().clamp_min(torch.finfo(loss.dtype).tiny)
        kept = change <= region.max_drift
        allowed = torch.ones_like(finite) if allowed is None else allowed
        moved = allowed & finite & within & kept & (size > 0)
        refusals = [
            ("the proposed weights or their gradient are not finite", ~finite),
            (f"the displacement is larger than {region.max_size:g}", finite & ~within),
            (f"the loss would change by more than {region.max_drift:g}", finite & ~kept),
        ]
        failures = add_failure({}, UNSTABLE, "; ".join(reasons(refusals)))
        element = torch.where(moved.unsqueeze(-1), step, 0.0)
        stays = allowed & finite & (size == 0)
        arrived, gain = point, torch.zeros_like(size) if bool(stays.any()) else None
        if bool(moved.any()):
            arrived = found.symmetry.act(element, start)
            gradients = {**start.gradients, **found.gradients}
            arrived = arrived.replace(gradients=gradients, loss=found.loss, stale=frozenset(), cotangents={})
            arrived = arrived.replace(activations=self.activations_after(start, found.symmetry))
            if not bool(moved.all()):
                arrived = arrived.choose(moved, start)
            gain = self.gain(start, arrived)
        if gain is not None:
            failures = add_failure(failures, NO_GAIN, gainless(gain, moved | stays))
        move = Move(
            symmetry=found.symmetry,
            element=element,
            size=torch.where(moved, size, 0.0),
            refused=~moved & ((size > 0) | ~finite | ~allowed),
            evaluations=found.evaluations,
            reason="; ".join(reasons([("moving was not allowed", ~allowed), *refusals])),
            gain=gain,
            failures=failures,
        )
        return arrived, [move], state

    def activations_after(self, start: Point, moved: Displacement) -> Tensors:
        """The layers' inputs at the new point, as far as they are known; none by default."""
        return {}


def gradients_at(point: Point, parameters: Mapping[str, Tensor], in_graph: bool = False) -> tuple[Tensor, Tensors]:
    """Loss and gradients at other parameters: one gradient evaluation.

    Args:
        point: with `loss_at`; the gradients are of the parameters that it has gradients of.
        parameters: the parameters that stand elsewhere than in the point.
        in_graph: whether the gradients can be differentiated; then in `parameters`, which have to stand in a graph.
    """
    assert point.loss_at is not None
    with torch.enable_grad(), _twice_differentiable() if in_graph else contextlib.nullcontext():
        known = {**point.parameters, **parameters}
        if not in_graph:
            known = {name: value.detach() for name, value in known.items()}
        wanted = {
            name: known[name] if known[name].requires_grad else known[name].detach().requires_grad_()
            for name in point.gradients
        }
        losses = point.loss_at({**known, **wanted})
        found = torch.autograd.grad(losses.sum(), list(wanted.values()), create_graph=in_graph, allow_unused=True)
    gradients = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(wanted.items(), found, strict=True)
    }
    return losses if in_graph else losses.detach(), gradients


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Replaces fused attention and cuDNN's recurrent networks, which have no second derivative, by plain ones."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
