"""The linear systems of batch pairs: rank conditions and least-norm solutions, differentiable and batched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metateleport.linalg import product
from metateleport.point import made_of

__all__ = ["fitted_to", "has_full_rank", "least_norm_over"]


def has_full_rank(rows: Tensor) -> Tensor:
    """Whether there are at most as many rows as columns and all of them independent, `(*batch,)`."""
    return made_of(rows, "full rank", lambda: _full_rank(rows))


def _full_rank(rows: Tensor) -> Tensor:
    if rows.shape[-2] > rows.shape[-1]:
        return torch.zeros(rows.shape[:-2], dtype=torch.bool, device=rows.device)
    # The decompositions raise on what is not finite, and spoil the whole batch.
    rows = torch.where(_finite(rows), rows, 0.0).detach()
    eps = torch.finfo(rows.dtype).eps
    if rows.dtype == torch.float64:
        # Of rows far from dependent their products tell as much, at a small part of the price.
        triangle, failed = torch.linalg.cholesky_ex(rows @ rows.mT)
        if not bool(failed.any()):
            inverse, _ = torch.linalg.inv_ex(triangle)
            if bool((torch.linalg.matrix_norm(triangle) * torch.linalg.matrix_norm(inverse) <= eps**-0.25).all()):
                return torch.ones(rows.shape[:-2], dtype=torch.bool, device=rows.device)
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

    Solved by a QR decomposition of the transpose, which keeps the half of the digits that the normal equations lose and
    needs no singular value decomposition. Where the rows are dependent and there is no such X, the answer is zero with
    finite derivatives, so that one task does not spoil the others of its batch.
    """
    return made_of(rows, "least norm", lambda: _solver(rows))


def _solver(rows: Tensor) -> Callable[[Tensor], Tensor]:
    if rows.shape[-2] > rows.shape[-1]:
        pseudo_inverse = torch.linalg.pinv(torch.where(_finite(rows), rows, 0.0))
        return lambda target: pseudo_inverse @ target
    q, r = torch.linalg.qr(rows.mT)
    diagonal = torch.diagonal(r.detach(), dim1=-2, dim2=-1).abs()
    usable = diagonal.amin(-1) > torch.finfo(rows.dtype).eps * diagonal.amax(-1)
    if bool(usable.all()):
        # Made transposed, as it is read: adding what stands the other way would take as long as the product.
        return lambda target: product(torch.linalg.solve_triangular(r.mT, target, upper=False).mT, q.mT).mT
    usable = usable.unsqueeze(-1).unsqueeze(-1)
    eye = torch.eye(*rows.shape[-2:], dtype=rows.dtype, device=rows.device)
    q, r = torch.linalg.qr(torch.where(usable, rows, eye).mT)
    return lambda target: q @ torch.linalg.solve_triangular(r.mT, torch.where(usable, target, 0.0), upper=False)


def fitted_to(old: Tensor, covectors: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Maps new rows $H'$ to the covectors $D + D (H - H')^\top H'^{+\top}$, so that $D H^\top$ stays as it is.

    The result equals that of `least_norm_over`, with a cheaper derivative: no decomposition is in the graph, so the
    derivative is that of an inverse, two products. Square matrices are inverted. For others the Gram matrix is inverted
    if that keeps half of the digits; if not, the rows are first made orthonormal by a triangular matrix that counts as
    constant, which is allowed because any basis of the samples gives the same result.

    Args:
        old: $H$, `(*batch, samples, width)`, with at most as many samples as the width.
        covectors: $D$, `(*batch, n, width)`.

    Returns:
        The map, from and to `(*batch, samples, width)` and `(*batch, n, width)`. Where the new rows are dependent,
        the covectors stay as they are.
    """
    products = covectors @ old.mT
    square = old.shape[-2] == old.shape[-1]
    eps = torch.finfo(old.dtype).eps

    def inverted(rows: Tensor) -> Tensor:
        inverse, _ = torch.linalg.inv_ex(rows)
        with torch.no_grad():
            usable = torch.linalg.matrix_norm(rows) * torch.linalg.matrix_norm(inverse) < 1 / eps
        if bool(usable.all()):
            return products @ inverse.mT
        usable = usable.unsqueeze(-1).unsqueeze(-1)
        eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        inverse = torch.linalg.inv(torch.where(usable, rows, eye))
        return torch.where(usable, products @ inverse.mT, covectors)

    def projected(rows: Tensor) -> Tensor:
        missing = products - covectors @ rows.mT
        gram = rows @ rows.mT
        inverse, _ = torch.linalg.inv_ex(gram)
        with torch.no_grad():
            well = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(inverse) < eps**-0.5
        if bool(well.all()):
            return covectors + missing @ inverse @ rows
        triangle = torch.linalg.qr(rows.detach().mT, mode="r")[1]
        diagonal = torch.diagonal(triangle, dim1=-2, dim2=-1).abs()
        usable = (diagonal.amin(-1) > eps * diagonal.amax(-1)).unsqueeze(-1).unsqueeze(-1)
        eye = torch.eye(*rows.shape[-2:], dtype=rows.dtype, device=rows.device)
        triangle, rows = torch.where(usable, triangle, eye[:, : rows.shape[-2]]), torch.where(usable, rows, eye)
        upright = torch.linalg.solve_triangular(triangle.mT, rows, upper=False)
        missing = torch.linalg.solve_triangular(triangle, missing, upper=True, left=False)
        return covectors + torch.where(usable, missing @ torch.linalg.inv(upright @ upright.mT) @ upright, 0.0)

    return inverted if square else projected


def _finite(matrices: Tensor) -> Tensor:
    """Whether all entries of each matrix are finite, `(*batch, 1, 1)`."""
    return matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
