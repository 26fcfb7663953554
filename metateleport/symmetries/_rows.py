"""The rows that a batch form solves for: whether they are independent, and what they are the image of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["has_full_rank", "least_norm_over"]


def has_full_rank(rows: Tensor) -> Tensor:
    """Whether there are at most as many rows as columns and all of them independent, `(*batch,)`."""
    if rows.shape[-2] > rows.shape[-1]:
        return torch.zeros(rows.shape[:-2], dtype=torch.bool, device=rows.device)
    # The decompositions raise on what is not finite, and spoil the whole batch.
    rows = torch.where(_finite(rows), rows, 0.0).detach()
    eps = torch.finfo(rows.dtype).eps
    # The ratio of the singular values is at most this product, which is had without them. Where it says that half of
    # the digits are left, rounding in it does not matter.
    triangle = torch.linalg.qr(rows.mT, mode="r")[1]
    eye = torch.eye(triangle.shape[-1], dtype=rows.dtype, device=rows.device)
    inverse = torch.linalg.solve_triangular(triangle, eye, upper=True)
    well = torch.linalg.matrix_norm(triangle) * torch.linalg.matrix_norm(inverse) <= eps**-0.5
    if bool(well.all()):
        return well
    singular = torch.linalg.svdvals(rows)
    tolerance = eps**0.75
    return singular[..., -1] > tolerance * singular[..., 0]


def least_norm_over(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Maps a target to the smallest X with `rows X = target`, for rows that are independent: `rows^+ target`.

    Through a QR decomposition of the transpose: half of the digits that the normal equations would lose are kept,
    and unlike a pseudo-inverse it costs no singular value decomposition. Where the rows are dependent, so that there
    is no such X, the answer is zero: finite, as are its derivatives, so that one task spoils no other of its batch.
    """
    if rows.shape[-2] > rows.shape[-1]:
        pseudo_inverse = torch.linalg.pinv(torch.where(_finite(rows), rows, 0.0))
        return lambda target: pseudo_inverse @ target
    q, r = torch.linalg.qr(rows.mT)
    diagonal = torch.diagonal(r.detach(), dim1=-2, dim2=-1).abs()
    usable = diagonal.amin(-1) > torch.finfo(rows.dtype).eps * diagonal.amax(-1)
    if bool(usable.all()):
        return lambda target: q @ torch.linalg.solve_triangular(r.mT, target, upper=False)
    usable = usable.unsqueeze(-1).unsqueeze(-1)
    eye = torch.eye(*rows.shape[-2:], dtype=rows.dtype, device=rows.device)
    q, r = torch.linalg.qr(torch.where(usable, rows, eye).mT)
    return lambda target: q @ torch.linalg.solve_triangular(r.mT, torch.where(usable, target, 0.0), upper=False)


def _finite(matrices: Tensor) -> Tensor:
    """Whether all entries of each matrix are finite, `(*batch, 1, 1)`."""
    return matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
