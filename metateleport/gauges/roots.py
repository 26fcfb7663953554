"""Roots of the covariances of two factors: the gauges in which one of them is white."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Roots", "inverse_root", "orthonormalising", "whitening_roots"]

_SHIFT = 8.0
"""Shift of a covariance with a diagonal of ones, in spacings of floating-point numbers a column."""

_DEFICIENT = 1e-4
"""Shift, relative to the mean variance, of factors that have fewer rows than columns."""

_SPECTRUM = 1e-10
"""Smallest eigenvalue, relative to their sum, that an inverse root reckons with in float64."""

_SPECTRUM_SINGLE = 1e-6

_NEWTON_STEPS = 34


class Roots(NamedTuple):
    r"""The gauges of the two sides of a pair, each a matrix $F$ of `(batch, k, m)` with $F F^\top$ the inverse metric.

    A covector $M$ of a side is seen in its gauge as $M F$; a step $D$ taken there is $D F^\top$ at home.

    Args:
        incoming: of $X_u$, whose metric is that of $X_d$.
        outgoing: of $X_d$, whose metric is that of $X_u$.
    """

    incoming: Tensor
    outgoing: Tensor


def orthonormalising(rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""The triangular $R$ with $X = Q R$, the columns of $Q$ orthonormal, and its inverse, by Cholesky twice.

    Whatever the scales of the columns are, and for condition numbers up to the root of the precision's, it is as exact
    as the QR decomposition, made of small matrices, and never waits for the device. The Gram matrix of $X$ alone would
    lose twice the digits of the condition number, and with them the invariance of the steps.

    Args:
        rows: $X$, `(batch, n, k)`.

    Returns:
        $R$ and $R^{-1}$, `(batch, k, k)`.

    Example:
        >>> x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> _, inverse = orthonormalising(x)
        >>> q = x @ inverse
        >>> bool(torch.allclose(q.mT @ q, torch.eye(3).double(), atol=1e-12))
        True

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices", SIAM J.
    Sci. Comput. 42 (2020).
    """
    count, width = rows.shape[-2:]
    size = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    largest = size.amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
    if count < width:
        mean = (size.square().mean(-1, keepdim=True) + torch.finfo(rows.dtype).tiny).sqrt()
        first, first_inverse = _cholesky((rows / mean).mT @ (rows / mean), _DEFICIENT)
        return first * mean, first_inverse / mean
    scale = torch.maximum(size, torch.finfo(rows.dtype).eps * largest)
    shift = _SHIFT * width * torch.finfo(rows.dtype).eps
    scaled = rows / scale
    first, first_inverse = _cholesky(scaled.mT @ scaled, shift)
    nearly = scaled @ first_inverse
    second, second_inverse = _cholesky(nearly.mT @ nearly, 0.0)
    # Where the columns depend on one another the second Gram matrix may be singular, and the shifted one has to do.
    holds = second_inverse.isfinite().all(-1).all(-1)[..., None, None]
    root = torch.where(holds, second @ first, first)
    inverse = torch.where(holds, first_inverse @ second_inverse, first_inverse)
    return root * scale, inverse / scale.mT


def _cholesky(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """The upper factor of a shifted matrix and its inverse, without waiting for the device; not finite if it fails."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(gram + shift * eye if shift else gram)
    lower = torch.where((info == 0)[..., None, None], lower, torch.nan)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return lower.mT, inverse.mT


def whitening_roots(outgoing: Tensor, incoming: Tensor, floor: Tensor | float, swapped: bool = False) -> Roots:
    r"""The gauges in which the other factor is white.

    With $C_d = X_d^\top X_d = R^\top R$, $R$ triangular, and $X = X_u R^\top$ what $X_u$ is where $X_d$ is orthonormal,

    $$F_u = R^{-1}, \qquad F_d = R^\top (X^\top X + \epsilon^2 1)^{-1} X^\top Q,$$

    $Q$ an orthonormal basis of the columns of $X$. Singular values $\sigma$ of the product $X_u X_d^\top$ are divided
    by where they are above $\epsilon$; directions that are far below are no part of the product, and their factor in
    $X_d$ is not moved, $\sigma / (\sigma^2 + \epsilon^2)$. So adapters leave $B = 0$, and those of a rank that is not
    needed stay bounded. The floor moves along with any element: no step depends on how the product is split.

    Args:
        outgoing: $X_d$, `(batch, n, k)`.
        incoming: $X_u$, `(batch, m, k)`.
        floor: $\epsilon$, a number or `(batch,)`.
        swapped: whether $X_u$ is the one that has full rank, and the floor is for the singular values of $X_d$.

    Returns:
        The gauges.

    Example:
        >>> a, b = torch.eye(2).unsqueeze(0), torch.diag(torch.tensor([5.0, 0.0])).unsqueeze(0)
        >>> gauges = whitening_roots(2 * a, b, 0.1)
        >>> (gauges.incoming @ gauges.incoming.mT)[0]
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
        >>> (gauges.outgoing @ gauges.outgoing.mT)[0].round(decimals=2)
        tensor([[0.0400, 0.0000],
                [0.0000, 0.0000]])
    """
    if swapped:
        turned = whitening_roots(incoming, outgoing, floor)
        return Roots(turned.outgoing, turned.incoming)
    root, inverse = orthonormalising(outgoing)
    seen = incoming @ root.mT
    gram = seen.mT @ seen
    trace = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)
    # Rounding of the Gram matrix alone must not decide; this much is relative to the product, and moves with it too.
    least = _SHIFT * gram.shape[-1] * torch.finfo(gram.dtype).eps * trace + torch.finfo(gram.dtype).tiny ** 0.5
    floor = torch.as_tensor(floor, dtype=gram.dtype, device=gram.device)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    _, above = _cholesky(gram + torch.maximum(floor.square(), least)[..., None, None] * eye, 0.0)
    # In coordinates of the columns' own: that of a Gram matrix's root would have the root of its rounding.
    own = seen if seen.shape[-2] <= seen.shape[-1] else torch.linalg.qr(seen, mode="r")[1]
    whole = outgoing.shape[-2] >= outgoing.shape[-1]
    return Roots(inverse if whole else inverse @ (inverse.mT @ outgoing.mT), root.mT @ (above @ (above.mT @ own.mT)))


def inverse_root(matrix: Tensor) -> Tensor:
    r"""$A^{-1/2}$ of positive semidefinite matrices, by Newton's iteration, without waiting for the device.

    Eigenvalues below 1e-10 of their sum (1e-6 in float32), or below rounding, count as that much; where a matrix is
    zero, so is the result.

    Args:
        matrix: `(batch, k, k)`.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([4.0, 1.0]).double()).unsqueeze(0))[0].round(decimals=6)
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]], dtype=torch.float64)

    Source: Higham, "Functions of matrices", 2008, equation 6.20.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    trace = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1)[..., None, None]
    tiny = torch.finfo(matrix.dtype).tiny
    least = _SPECTRUM if matrix.dtype == torch.float64 else _SPECTRUM_SINGLE
    # An eigenvalue that rounding has left below zero would grow from step to step.
    least = max(least, _SHIFT * matrix.shape[-1] * torch.finfo(matrix.dtype).eps)
    known = trace.clamp_min(tiny)
    near, root = (matrix + matrix.mT) / (2 * known) + least * eye, eye.expand_as(matrix)
    for _ in range(_NEWTON_STEPS):
        step = 1.5 * eye - 0.5 * root @ near
        near, root = near @ step, step @ root
    return torch.where(trace > tiny, root / known.sqrt(), 0.0)
