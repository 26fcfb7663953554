"""Spectral functions of covariances that survive what optimisation does to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["diagonal_logs", "relative_shift", "symmetric_log", "symmetric_logs"]

_RELATIVE_SHIFT = {torch.float64: 1e-13, torch.float32: 1e-9}


def relative_shift(dtype: torch.dtype) -> float:
    """What is added to a covariance before its logarithm, relative to its largest eigenvalue.

    Example:
        >>> relative_shift(torch.float64)
        1e-13
    """
    return _RELATIVE_SHIFT.get(dtype, 1e-9)


def symmetric_log(matrix: Tensor, shift: float | None = None, rank: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Logarithm of positive semidefinite matrices, $\log(A + \epsilon\,\lambda_{\max} 1)$, in float64.

    Where `eigh` does not converge (seen on ill-conditioned stacks) a larger shift is tried, and where that fails the
    logarithm is zero: the generator is then left out.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.
        shift: $\epsilon$, relative to the largest eigenvalue; `relative_shift` of the dtype if not given.
        rank: directions whose eigenvalue is below this, relative to the largest, get the largest one's logarithm: no
            power of the matrix then stretches what is not there.

    Returns:
        The logarithms, `(*batch, k, k)`, and the logarithms of the eigenvalues in ascending order, `(*batch, k)`,
        both in the dtype of the input.

    Example:
        >>> log, _ = symmetric_log(torch.diag(torch.tensor([1.0, 4.0])))
        >>> bool(torch.allclose(log, torch.diag(torch.tensor([0.0, 1.3863])), atol=1e-4))
        True
    """
    logs, values = symmetric_logs(matrix, (relative_shift(matrix.dtype) if shift is None else shift,), rank)
    return logs[..., 0, :, :], values[..., 0, :]


def symmetric_logs(matrix: Tensor, shifts: Sequence[float], rank: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logarithms of positive semidefinite matrices with several shifts, for one decomposition; see `symmetric_log`.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.
        shifts: each relative to the largest eigenvalue.
        rank: as in `symmetric_log`.

    Returns:
        The logarithms, `(*batch, shifts, k, k)`, and those of the eigenvalues in ascending order,
        `(*batch, shifts, k)`, both in the dtype of the input.

    Example:
        >>> logs, values = symmetric_logs(torch.eye(2), (0.0, 1.0))
        >>> values
        tensor([[0.0000, 0.0000],
                [0.6931, 0.6931]])
    """
    symmetric = (matrix + matrix.mT).double() / 2
    scale = torch.diagonal(symmetric, dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(torch.float64).tiny)
    scaled = symmetric / scale[..., None, None]
    usable = scaled.isfinite().all(-1).all(-1) & (scale < float("inf"))
    unit = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    scaled = torch.where(usable[..., None, None], scaled, unit)
    values, vectors, converged = _eigh(scaled)
    usable = (usable & converged)[..., None, None]
    largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    # What is below rounding is nothing: its logarithm would be that of noise.
    noise = 2 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    values = torch.where(values < noise * largest, 0.0, values)
    values = torch.where(values < rank * largest, largest, values)
    added = torch.tensor(shifts, dtype=torch.float64, device=matrix.device).unsqueeze(-1) * largest.unsqueeze(-2)
    logs = (values.unsqueeze(-2) + added).log() + scale.log()[..., None, None]
    logs = torch.where(usable, logs, torch.zeros_like(logs))
    whole = (vectors.unsqueeze(-3) * logs.unsqueeze(-2)) @ vectors.mT.unsqueeze(-3)
    return whole.to(matrix.dtype), logs.to(matrix.dtype)


def diagonal_logs(values: Tensor, shifts: Sequence[float]) -> Tensor:
    """Logarithms of a covariance's diagonal with several shifts, for groups that see no more of it.

    Args:
        values: the diagonal, `(*batch, k)`; what rounding has made negative counts as zero.
        shifts: each relative to the largest value.

    Returns:
        `(*batch, shifts, k)`.

    Example:
        >>> diagonal_logs(torch.tensor([1.0, 0.0]), (1.0,))
        tensor([[0.6931, 0.0000]])
    """
    values = values.clamp_min(0)
    largest = values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.stack([(values + shift * largest).log() for shift in shifts], -2)


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
