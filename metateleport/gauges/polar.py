"""Polar factors from Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.linalg import POLAR_STEPS, eigenpairs, polar_polynomial

__all__ = ["definite", "polar_by_gram", "polar_of_gram"]


def polar_of_gram(gram: Tensor) -> Tensor:
    r"""$P$ with $X P$ nearly the polar factor of $X$, from $N = X^\top X$: $k \times k$ matrices alone.

    It is `metateleport.linalg.polar_polynomial` of $N$ over its trace.

    Args:
        gram: $N$, `(batch, k, k)`, without eigenvalues far below zero: of those the polynomial makes more (`definite`).

    Returns:
        $P$, `(batch, k, k)`, which is nearly $N^{-1/2}$.

    Example:
        >>> polar_of_gram(torch.full((1, 1, 1), 4.0)).shape
        torch.Size([1, 1, 1])
    """
    size = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)[..., None, None]
    size = size + torch.finfo(gram.dtype).tiny ** 0.5
    return polar_polynomial(gram / size, POLAR_STEPS) / size.sqrt()


def definite(gram: Tensor) -> Tensor:
    """A Gram matrix that was multiplied by a gauge, without what rounding has left below zero.

    In a gauge of a large condition number that is more than rounding of the matrix itself. What is added is kept out of
    the graph.

    Args:
        gram: `(batch, k, k)`.

    Example:
        >>> definite(torch.diag(torch.tensor([1.0, -0.5])).unsqueeze(0))[0]
        tensor([[1., 0.],
                [0., 0.]])
    """
    gram = (gram + gram.mT) / 2
    with torch.no_grad():
        values, vectors, _ = eigenpairs(gram.nan_to_num(0.0, 0.0, 0.0))
        lacking = (vectors * values.clamp_max(0.0).neg().unsqueeze(-2)) @ vectors.mT
    return gram + lacking


def polar_by_gram(rows: Tensor) -> Tensor:
    """Nearly the polar factor of tall matrices, as `metateleport.linalg.polar_factors`, from their Gram matrices.

    Args:
        rows: `(batch, n, k)`.

    Returns:
        Of the same shape; zero where a matrix is zero.

    Example:
        >>> from metateleport.linalg import polar_factors
        >>> x = torch.randn(1, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(polar_by_gram(x), polar_factors([x])[0], atol=1e-12))
        True

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, for the polynomial.
    """
    return rows @ polar_of_gram(rows.mT @ rows)
