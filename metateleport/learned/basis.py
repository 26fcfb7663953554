"""An equivariant basis of the Lie algebra, and invariant features, from a symmetry's small matrices.

The generators are built from matrices that move with the weights: permuting the hidden units permutes the generators,
whatever the width, so coefficients over them serve every width. Covariances and their logarithms transform by
conjugation under the orthogonal part of GL(k); the moments $U^\\top G_U$ and $G_V V^\\top$ under all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metateleport.groups import Group
from metateleport.linalg import diagonal_spectrum, relative_shift, symmetric_log
from metateleport.point import Point
from metateleport.symmetries import Symmetry

__all__ = ["BASIS", "FEATURES", "Observation", "observe", "symmetric_log"]

_COVARIANCES = (
    "feature_covariance",
    "outgoing_covariance",
    "incoming_covariance",
    "outgoing_gradient_covariance",
    "incoming_gradient_covariance",
)
_MOMENTS = ("outgoing_moment", "incoming_moment")
_PAIR = (*(f"log {name}" for name in _COVARIANCES), *_MOMENTS, "identity")

BASIS: dict[str, tuple[str, ...]] = {
    "GL": _PAIR,
    "diagonal": _PAIR,
    "O": ("ascent", "second_ascent", "descent"),
}
"""Names of the generators by the group's name, in the order of the coefficients."""

FEATURES: dict[str, int] = {"GL": 14, "diagonal": 14, "O": 6}
"""Number of invariant features by the group's name."""


class Observation(NamedTuple):
    """What a learned teleporter sees of one symmetry.

    Args:
        basis: generators, `(*batch, count, *group.shape)`.
        features: invariants of order one, `(*batch, count)`.
    """

    basis: Tensor
    features: Tensor


def observe(symmetry: Symmetry, point: Point, detach: bool = True) -> Observation:
    """The basis and the features of a symmetry at a point.

    Args:
        symmetry: the symmetry.
        point: where the model stands.
        detach: keep both out of the graph. The backward pass of `eigh` is infinite where eigenvalues coincide, as
            those of whitened features do; only for tests of the gradient itself is this switched off.

    Returns:
        The observation; what the symmetry or the point cannot tell is zero.
    """
    point = point.detach() if detach and torch.is_grad_enabled() else point
    group = symmetry.group
    if group.name == "diagonal":
        return _observe_diagonals(symmetry.diagonals(point))
    matrices = symmetry.matrices(point)
    return _observe_vectors(group, matrices) if group.name == "O" else _observe_pair(group, matrices)


def _observe_diagonals(found: dict[str, Tensor]) -> Observation:
    known = next(iter(found.values()))
    tiny, zero = torch.finfo(known.dtype).tiny, torch.zeros_like(known)
    covariances = torch.stack([found.get(name, zero) for name in _COVARIANCES], -2)
    logs = diagonal_spectrum(covariances).log(relative_shift(known.dtype))
    spread = torch.stack(((logs.amax(-1) - logs.mean(-1)) / 10, logs.std(-1, correction=0) / 10), -1)
    there = torch.tensor([name in found for name in _COVARIANCES], device=known.device).unsqueeze(-1)
    moments = torch.stack([found.get(name, zero) for name in _MOMENTS], -2)
    norms = torch.linalg.vector_norm(moments, dim=-1)
    # The moment over the product of its factors' norms: how far the step's direction lies along the orbit.
    factors = torch.stack([_factor_norms(name, found) for name in _MOMENTS], -1)
    along = torch.stack((norms / factors, moments.sum(-1) / factors), -1)
    directions = moments / norms.clamp_min(tiny).unsqueeze(-1)
    basis = torch.cat((torch.where(there, logs, 0.0), directions, torch.ones_like(known).unsqueeze(-2)), -2)
    features = torch.cat((torch.where(there, spread, 0.0), along), -2).flatten(-2)
    return Observation(basis, features)


def _observe_pair(group: Group, matrices: dict[str, Tensor]) -> Observation:
    known = next(iter(matrices.values()))
    batch = known.shape[:-2]
    generators, features = [], []
    for name in _COVARIANCES:
        if name not in matrices:
            generators.append(known.new_zeros(*batch, *group.shape))
            features += [known.new_zeros(batch)] * 2
            continue
        generator, logs = symmetric_log(matrices[name])
        generators.append(group.project(generator))
        features += [(logs.amax(-1) - logs.mean(-1)) / 10, logs.std(-1, correction=0) / 10]
    for name in _MOMENTS:
        if name not in matrices:
            generators.append(known.new_zeros(*batch, *group.shape))
            features += [known.new_zeros(batch)] * 2
            continue
        generator = group.project(matrices[name])
        norm = group.norm(generator).clamp_min(torch.finfo(known.dtype).tiny)
        generators.append(generator / group.expand(norm))
        factors = _factor_norms(name, _diagonals(matrices))
        trace = torch.diagonal(matrices[name], dim1=-2, dim2=-1).sum(-1)
        features += [norm / factors, trace / factors]
    generators.append(
        group.project(torch.eye(group.size, dtype=known.dtype, device=known.device)).expand(*batch, *group.shape)
    )
    return Observation(torch.stack(generators, len(batch)), torch.stack(features, -1))


def _diagonals(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.diagonal(value, dim1=-2, dim2=-1) for name, value in matrices.items()}


def _factor_norms(moment: str, diagonals: dict[str, Tensor]) -> Tensor:
    """Product of the norms of a moment's two factors, whose squares are traces; one where they are not known."""
    side = moment.removesuffix("_moment")
    names = (f"{side}_covariance", f"{side}_gradient_covariance")
    if not all(name in diagonals for name in names):
        return torch.ones_like(next(iter(diagonals.values()))[..., 0])
    weights, gradients = (diagonals[name].sum(-1) for name in names)
    return (weights * gradients).clamp_min(torch.finfo(weights.dtype).tiny).sqrt()


def _observe_vectors(group: Group, matrices: dict[str, Tensor]) -> Observation:
    generators, features = [], []
    for name in BASIS["O"]:
        outer = matrices[name]
        generator = group.project(outer)
        norm = group.norm(generator)
        generators.append(generator / group.expand(norm.clamp_min(torch.finfo(outer.dtype).tiny)))
        whole = torch.linalg.matrix_norm(outer).clamp_min(torch.finfo(outer.dtype).tiny)
        trace = torch.diagonal(outer, dim1=-2, dim2=-1).sum(-1)
        features += [norm / whole, trace / whole]
    return Observation(torch.stack(generators, outer.ndim - 2), torch.stack(features, -1))
