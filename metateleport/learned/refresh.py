"""When a gauge in use is made anew, and what is held of it until then."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metateleport.gauges import Gauge, Names
from metateleport.learned.curvature import largest_of
from metateleport.linalg import eigen
from metateleport.symmetries import LinearPair, Symmetry

__all__ = ["Held", "Refresh", "Renewed", "held_gauge"]

Held = dict[str, Any]

_NARROWEST = 4
"""Steps that the narrowest gauge that is held may be held for."""


class Renewed(NamedTuple):
    """A gauge that has just been chosen, to be held from now on.

    Args:
        generator: symmetric, `(*batch, k, k)`.
        size: its Frobenius norm, `(*batch,)`.
        curvature: the curvature above, for the gauge of the lower side, `(*batch, k, k)`.
        features: that it was chosen by.
    """

    generator: Tensor
    size: Tensor
    curvature: Tensor | None
    features: Tensor


@dataclasses.dataclass(frozen=True)
class Refresh:
    r"""Gauges of wide layers are made anew every $k$ steps and held in between; $k$ goes by how much they change.

    A gauge $g$ that replaces a held one $h$ has changed by $|g^{-1} h - 1|_F / \sqrt n$, the root mean square over the
    $n$ directions of the relative difference of the two. If that is below `little`, the new one is held twice as long
    as the old one was; if not, for half as many, and for one step only if it is above `much`. The wider a gauge, the
    more a new one costs beside the rest of a step, and the longer it may be held: four steps for the narrowest that is
    held at all, with the square of the width for wider ones, and `longest` steps at most. After a step that was taken
    back, and after a teleport, all gauges are made anew.

    Held are the element, the matrix that it multiplies covectors with, the features that the network reads, and the
    bound on the curvature above in the gauge, which follows the Frobenius norm of that curvature from step to step. The
    running means of covariances go on at every step.

    Args:
        smallest: width of the narrowest gauge that is held; of narrower ones a new one costs too little.
        longest: largest number of steps that a gauge is held for.
        little: change below which the number of steps doubles; above it the number is halved.
        much: change above which it goes back to one.

    Example:
        >>> refresh = Refresh(longest=16, little=0.05, much=0.5)
        >>> [refresh.length(8, change, width=512) for change in (0.01, 0.1, 2.0)]
        [16, 4, 1]
        >>> refresh.length(8, 0.01, width=128)
        4

    Source: the fixed number of steps between two decompositions is that of Vyas et al., "SOAP: Improving and
    stabilizing Shampoo using Adam" (arXiv 2409.11321), section 4.
    """

    smallest: int = 128
    longest: int = 32
    little: float = 0.07
    much: float = 0.5

    def holds(self, symmetry: Symmetry) -> bool:
        """Whether gauges of a symmetry are held: of wide linear pairs."""
        return isinstance(symmetry, LinearPair) and symmetry.width >= self.smallest

    def length(self, before: int, change: float, width: int) -> int:
        """For how many steps the new gauge serves, after one that has served for `before` and changed by `change`."""
        if before == 0 or not change <= self.much:
            return 1
        longest = min(self.longest, _NARROWEST * width**2 // self.smallest**2)
        return min(longest, 2 * before) if change < self.little else max(1, before // 2)

    def nothing(self, symmetry: Symmetry, features: int, like: Tensor) -> Held:
        """What is held before the first gauge; there from the start, so that a saved state fits a fresh one."""
        batch = like.shape
        matrix, number = like.new_zeros(*batch, *symmetry.group.shape), like.new_zeros(batch)
        numbers = {"size": number, "above": number, "norm": number, "features": like.new_zeros(*batch, features)}
        return {"left": 0, "length": 0, "element": matrix, "square": matrix, **numbers}

    def after(
        self, held: Mapping[str, Held], waiting: Mapping[str, Held], renewed: Mapping[str, Renewed]
    ) -> dict[str, Held]:
        """What is held after a step, and what it uses.

        Args:
            held: what was held before it, by key.
            waiting: of gauges that the step uses as they are held.
            renewed: the gauges that were made anew.

        Returns:
            All of `held`, with how many steps each serves yet.
        """
        found = {**held, **{key: {**each, "left": each["left"] - 1} for key, each in waiting.items()}}
        made, changes = {}, {}
        for key, chosen in renewed.items():
            values, vectors = eigen(chosen.generator)
            made[key] = _held(chosen, values, vectors)
            if held[key]["length"]:
                changes[key] = _change(values, vectors, held[key]["element"])
        # All at once: on an accelerator each look at a number is a wait.
        known = dict(zip(changes, torch.stack(list(changes.values())).tolist() if changes else (), strict=True))
        for key, each in made.items():
            length = self.length(held[key]["length"], known.get(key, 0.0), each["element"].shape[-1])
            found[key] = {"left": length - 1, "length": length, **each}
        return found


def held_gauge(symmetry: Symmetry, side: Any, names: Names, held: Held, curvature: Tensor | None) -> Gauge:
    """The gauge that is held, its bound on the curvature above brought up to date.

    Args:
        symmetry: of the gauge.
        side: that its tensors are on.
        names: of its tensors.
        held: what is held of it.
        curvature: the curvature above as it is now, for the gauge of the lower side.
    """
    above = None
    if curvature is not None:
        tiny = torch.finfo(curvature.dtype).tiny
        above = held["above"] * _norm(held["square"], curvature) / held["norm"].clamp_min(tiny)
    return Gauge(symmetry, side, names, held["element"], held["size"], held["square"], above)


def _held(made: Renewed, values: Tensor, vectors: Tensor) -> Held:
    grown = values.exp().unsqueeze(-2)
    lower = made.curvature is not None
    square = (vectors / grown.square() if lower else vectors * grown.square()) @ vectors.mT
    above = norm = torch.zeros_like(made.size)
    if made.curvature is not None:
        # In the eigenvectors' basis, in which the largest eigenvalue and the norm are the same.
        seen = (vectors.mT @ made.curvature @ vectors) / grown / grown.mT
        above, norm = largest_of(seen), torch.linalg.matrix_norm(seen)
    return {
        "element": (vectors * grown) @ vectors.mT,
        "square": square,
        "size": made.size,
        "above": above,
        "norm": norm,
        "features": made.features,
    }


def _norm(square: Tensor, curvature: Tensor) -> Tensor:
    """Frobenius norm of the curvature in the gauge: the root of the trace of $(S g^{-1} g^{-T})^2$."""
    product = curvature @ square
    return (product * product.mT).sum((-2, -1)).clamp_min(0).sqrt()


def _change(values: Tensor, vectors: Tensor, before: Tensor) -> Tensor:
    """The largest over the tasks of the relative difference of a gauge and the one before it."""
    # An orthogonal factor in front changes no Frobenius norm.
    difference = vectors.mT @ before / values.exp().unsqueeze(-1) - vectors.mT
    return torch.linalg.matrix_norm(difference).amax() / values.shape[-1] ** 0.5
