"""Sharpness: the mean loss on spheres around a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metateleport.objectives._batch_norm import DifferentiableBatchNorm
from metateleport.objectives.base import Objective
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry

__all__ = ["Sharpness"]


class Sharpness(Objective):
    r"""The mean loss at random points around a point, at several distances.

    $$\varphi(w) = \frac{1}{|R|\,|D|} \sum_{r \in R} \sum_{d \in D} L(w + r\,d), \qquad |d| = 1,$$

    with the directions $d$ uniform on the unit sphere of all parameters together. The loss at $w$ itself is constant
    on an orbit, so that sharpness measures how steeply it rises around $w$. Every call draws the same directions from
    the seed, the same for all tasks of a stack, so that two values can be compared.

    Args:
        radii: the distances $r$, all positive.
        directions: how many directions.
        seed: seeds the directions.
        at_once: how many perturbed copies are evaluated together, by `torch.func.vmap`; 1 works with every model.

    Raises:
        ValueError: if there is no radius or one is not positive, or a number is less than one.

    Example:
        >>> point = Point({"w": torch.zeros(2)}, loss=torch.tensor(0.0), loss_at=lambda w: w["w"].square().sum())
        >>> Sharpness(radii=(1.0, 3.0), directions=4)(point)
        tensor(5.)

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 4.1. Their code draws the directions from the positive
    orthant; here they are uniform, as the text has it. Its radii are 0.001, 0.011, ..., 0.191 on MNIST and a tenth of
    that on Fashion-MNIST and CIFAR-10.
    """

    reads_gradients = False
    needs_loss = True

    def __init__(
        self,
        radii: Sequence[float] = (0.05, 0.1, 0.2),
        directions: int = 10,
        seed: int = 0,
        at_once: int = 1,
    ) -> None:
        self.radii = tuple(float(radius) for radius in radii)
        if not self.radii or not all(0 < radius < float("inf") for radius in self.radii):
            raise ValueError(f"sharpness needs radii, each positive and finite, not {radii!r}")
        if directions < 1 or at_once < 1:
            raise ValueError(f"directions and at_once are at least one, not {directions!r} and {at_once!r}")
        self.directions, self.seed, self.at_once = directions, seed, at_once

    def evaluations(self, symmetry: Symmetry, point: Point) -> float:
        return float(len(self.radii) * self.directions)

    def __call__(self, point: Point) -> Tensor:
        if point.loss_at is None:
            raise ValueError("sharpness evaluates the loss around the point: evaluate the point with a loss")
        loss_at, fixed = point.loss_at, point.parameters
        # Buffers that a symmetry moves stand among the parameters, and have no gradient.
        names = [name for name in fixed if name in point.gradients or not point.gradients]
        total: Tensor | float = 0.0
        for offsets in self._offsets(
            {name: fixed[name] for name in names}, 0 if point.loss is None else point.loss.ndim
        ):
            copies = {name: fixed[name] + offset for name, offset in offsets.items()}
            with DifferentiableBatchNorm():
                if self.at_once == 1:
                    total = total + loss_at({**fixed, **{name: copy.squeeze(0) for name, copy in copies.items()}})
                else:
                    losses = torch.func.vmap(lambda moved: loss_at({**fixed, **moved}), randomness="same")(copies)
                    total = total + losses.sum(0)
        return torch.as_tensor(total / (len(self.radii) * self.directions))

    def _offsets(self, parameters: Tensors, batch: int) -> Iterator[Tensors]:
        """Steps from the point, `(at_once, *(1, for each batch dimension), *shape)`, until all are through."""
        source = torch.Generator().manual_seed(self.seed)
        pending: list[Tensors] = []
        for _ in range(self.directions):
            drawn = {
                name: torch.randn(value.shape[batch:], generator=source, dtype=torch.float64)
                for name, value in parameters.items()
            }
            norm = sum(float(value.square().sum()) for value in drawn.values()) ** 0.5
            for radius in self.radii:
                pending.append({name: value * (radius / norm) for name, value in drawn.items()})
                if len(pending) == self.at_once:
                    yield _stacked(pending, parameters, batch)
                    pending = []
        if pending:
            yield _stacked(pending, parameters, batch)


def _stacked(steps: Sequence[Tensors], parameters: Tensors, batch: int) -> Tensors:
    return {
        name: torch.stack([step[name] for step in steps]).reshape(-1, *(1,) * batch, *value.shape[batch:]).to(value)
        for name, value in parameters.items()
    }
