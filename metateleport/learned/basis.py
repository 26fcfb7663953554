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

_RELATIVE_SHIFT = {torch.float64: 1e-13, torch.float32: 1e-9}


class Observation(NamedTuple):
    """What a learned teleporter sees of one symmetry.

    Args:
        basis: generators, `(*batch, count, *group.shape)`.
        features: invariants of order one, `(*batch, count)`.
    """

    basis: Tensor
    features: Tensor


def symmetric_log(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Logarithm of positive semidefinite matrices, $\log(A + \epsilon\,\lambda_{\max} 1)$, in float64.

    Where `eigh` does not converge (seen on ill-conditioned stacks) a larger shift is tried, and where that fails the
    logarithm is zero: the generator is then left out.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.

    Returns:
        The logarithms, `(*batch, k, k)`, and the logarithms of the eigenvalues in ascending order, `(*batch, k)`,
        both in the dtype of the input.

    Example:
        >>> log, _ = symmetric_log(torch.diag(torch.tensor([1.0, 4.0])))
        >>> bool(torch.allclose(log, torch.diag(torch.tensor([0.0, 1.3863])), atol=1e-4))
        True
    """
    symmetric = (matrix + matrix.mT).double() / 2
    scale = torch.diagonal(symmetric, dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    scaled = symmetric / scale[..., None, None]
    usable = scaled.isfinite().all(-1).all(-1) & (scale < float("inf"))
    unit = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    scaled = torch.where(usable[..., None, None], scaled, unit)
    values, vectors, converged = _eigh(scaled)
    usable = usable & converged
    largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    shift = _RELATIVE_SHIFT.get(matrix.dtype, 1e-9) * largest
    logs = (values.clamp_min(0) + shift).log() + scale.log().unsqueeze(-1)
    logs = torch.where(usable.unsqueeze(-1), logs, torch.zeros_like(logs))
    log = (vectors * logs.unsqueeze(-2)) @ vectors.mT
    return log.to(matrix.dtype), logs.to(matrix.dtype)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors and where they converged; a stack of which one matrix fails is taken apart."""
    batch = matrix.shape[:-2]
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors, torch.ones(batch, dtype=torch.bool, device=matrix.device)
    except torch.linalg.LinAlgError:
        pass
    if batch:
        parts = [_eigh(each) for each in matrix.flatten(0, -3)]
        values, vectors, converged = (torch.stack(each) for each in zip(*parts, strict=True))
        return values.reshape(*batch, -1), vectors.reshape(matrix.shape), converged.reshape(batch)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    try:
        values, vectors = torch.linalg.eigh(matrix + 1e-8 * unit)
        return values, vectors, torch.ones((), dtype=torch.bool, device=matrix.device)
    except torch.linalg.LinAlgError:
        return torch.ones_like(matrix[0]), unit, torch.zeros((), dtype=torch.bool, device=matrix.device)


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
    matrices = symmetry.matrices(point)
    if detach:
        matrices = {name: value.detach() for name, value in matrices.items()}
    group = symmetry.group
    if group.name == "O":
        return _observe_vectors(group, matrices)
    return _observe_pair(group, matrices)


def _observe_pair(group: Group, matrices: dict[str, Tensor]) -> Observation:
    known = next(iter(matrices.values()))
    batch = known.shape[:-2]
    generators, features = [], []
    for name in _COVARIANCES:
        if name not in matrices:
            generators.append(known.new_zeros(*batch, *group.shape))
            features += [known.new_zeros(batch)] * 2
            continue
        if group.name == "diagonal":
            diagonal = torch.diagonal(matrices[name], dim1=-2, dim2=-1).clamp_min(0)
            largest = diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(known.dtype).tiny)
            logs = (diagonal + _RELATIVE_SHIFT.get(known.dtype, 1e-9) * largest).log()
            generators.append(logs)
        else:
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
        # The moment over the product of its factors' norms: how far the step's direction lies along the orbit.
        factors = _factor_norms(name, matrices)
        trace = torch.diagonal(matrices[name], dim1=-2, dim2=-1).sum(-1)
        features += [norm / factors, trace / factors]
    generators.append(
        group.project(torch.eye(group.size, dtype=known.dtype, device=known.device)).expand(*batch, *group.shape)
    )
    return Observation(torch.stack(generators, len(batch)), torch.stack(features, -1))


def _factor_norms(name: str, matrices: dict[str, Tensor]) -> Tensor:
    side = name.removesuffix("_moment")
    weights, gradients = (
        torch.diagonal(matrices[factor], dim1=-2, dim2=-1).sum(-1)
        for factor in (f"{side}_covariance", f"{side}_gradient_covariance")
    )
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
