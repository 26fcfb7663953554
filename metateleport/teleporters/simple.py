"""The two controls for every other teleporter: none, and a random element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metateleport.groups import random_source
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Teleporter, TrustRegion

__all__ = ["NoTeleport", "RandomTeleporter", "no_motion"]


def no_motion(symmetry: Symmetry, point: Point) -> Tensor:
    """The generator zero of a symmetry, in the point's batch, dtype and device."""
    weight = point.parameters[symmetry.parameters[0]]
    batch = () if point.loss is None else point.loss.shape
    return weight.new_zeros(*batch, *symmetry.group.shape)


class NoTeleport(Teleporter):
    """Stays where it is: g = 1.

    Example:
        >>> NoTeleport().name
        'none'
    """

    name = "none"

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        return no_motion(symmetry, point), state


class RandomTeleporter(Teleporter):
    """A random direction of the Lie algebra, of a given size.

    Args:
        size: Frobenius norm of the generator of each symmetry.
        seed: seeds the draws.
        generator: a `torch.Generator` on the CPU, instead of a seed.
        trust_region: bounds on each teleport.

    Raises:
        ValueError: if the size is negative or not finite, or both a seed and a generator are given.

    Example:
        >>> RandomTeleporter(size=0.5, seed=0).size
        0.5
    """

    name = "random"

    def __init__(
        self,
        size: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        trust_region: TrustRegion | None = None,
    ) -> None:
        super().__init__(trust_region)
        if not 0 <= size < float("inf"):
            raise ValueError(f"the size is the Frobenius norm of a generator: finite and at least zero, not {size!r}")
        self.size = float(size)
        self.source = random_source(seed, generator)

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        like = no_motion(symmetry, point)
        batch = like.shape[: like.ndim - len(symmetry.group.shape)]
        drawn = symmetry.group.random_generator(
            *batch, size=self.size, generator=self.source, dtype=like.dtype, device=like.device
        )
        return drawn, state
