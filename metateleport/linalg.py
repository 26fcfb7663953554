"""Functions of tensors that survive what optimisation does to them: spectra, polar factors, finite derivatives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metateleport.groups import product

__all__ = [
    "Spectrum",
    "alike",
    "all_finite",
    "diagonal_spectrum",
    "eigen",
    "finite_gradient",
    "first_not_finite",
    "fit",
    "polar_factors",
    "quick_spectrum",
    "relative_shift",
    "rms",
    "squarable",
    "symmetric_log",
    "symmetric_spectrum",
]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_POLAR_STEPS = 5
_HALVES = 128
"""Matrices of fewer rows are multiplied in float32: converting them to bfloat16 costs more than it saves."""

_CHUNK = 2**24
"""Largest number of bytes of matrices whose polar factors are computed in one call."""

_RELATIVE_SHIFT = {torch.float64: 1e-13, torch.float32: 1e-9}


def relative_shift(dtype: torch.dtype) -> float:
    """The shift that is added to a covariance before its logarithm, relative to its largest eigenvalue.

    Example:
        >>> relative_shift(torch.float64)
        1e-13
    """
    return _RELATIVE_SHIFT.get(dtype, 1e-9)


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigendecomposition of a positive semidefinite matrix, in units of its largest eigenvalue.

    Args:
        values: the eigenvalues, divided by the largest, `(*batch, k)`; in ascending order if `vectors` are given.
        vectors: the eigenvectors, `(*batch, k, k)`, or None for a diagonal matrix, whose entries are not sorted.
        largest: logarithm of the largest eigenvalue, `(*batch,)`.
        usable: whether the decomposition succeeded, `(*batch,)`; where it did not, all logarithms are zero.
        dtype: of the matrix; the decomposition itself is in float64, unless it was made by `quick_spectrum`.

    Example:
        >>> symmetric_spectrum(torch.diag(torch.tensor([1.0, 4.0]))).logs(0.0)
        tensor([0.0000, 1.3863])
    """

    values: Tensor
    vectors: Tensor | None
    largest: Tensor
    usable: Tensor
    dtype: torch.dtype

    def logs(self, shift: float | Tensor) -> Tensor:
        """Logarithms of the shifted eigenvalues, `(*batch, k)`; the shift is relative, a number or `(*batch,)`."""
        return self._logs(shift).to(self.dtype)

    def log(self, shift: float | Tensor) -> Tensor:
        r"""The logarithm $\log(A + \epsilon\,\lambda_{\max} 1)$, `(*batch, k, k)`, or `(*batch, k)` of a diagonal."""
        logs = self._logs(shift)
        if self.vectors is None:
            return logs.to(self.dtype)
        whole = product(self.vectors * logs.to(self.vectors.dtype).unsqueeze(-2), self.vectors.mT)
        return whole.to(self.dtype)

    def _logs(self, shift: float | Tensor) -> Tensor:
        added = shift.double().unsqueeze(-1) if isinstance(shift, Tensor) else shift
        logs = (self.values + added).log() + self.largest.unsqueeze(-1)
        return torch.where(self.usable.unsqueeze(-1), logs, 0.0)


def symmetric_spectrum(matrix: Tensor, rank: float = 0.0) -> Spectrum:
    """The eigendecomposition of positive semidefinite matrices, in float64.

    Where `eigh` does not converge (seen on ill-conditioned stacks), a shifted matrix is tried. Where that fails too, or
    the matrix is not finite, the logarithms are zero, and a generator made of them is zero.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.
        rank: eigenvalues below this, relative to the largest, are replaced by the largest. No power of the matrix then
            stretches the directions that a matrix of low rank lacks.

    Returns:
        The spectrum.

    Example:
        >>> symmetric_spectrum(torch.diag(torch.tensor([2.0, 4.0]))).values
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    symmetric = (matrix + matrix.mT).double() / 2
    tiny = torch.finfo(torch.float64).tiny
    scale = torch.diagonal(symmetric, dim1=-2, dim2=-1).amax(-1).clamp_min(tiny)
    scaled = symmetric / scale[..., None, None]
    usable = scaled.isfinite().all(-1).all(-1) & (scale < float("inf"))
    unit = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    scaled = torch.where(usable[..., None, None], scaled, unit)
    values, vectors, converged = _eigh(scaled)
    usable = usable & converged
    largest = values[..., -1].clamp_min(tiny)
    values = values / largest.unsqueeze(-1)
    # Eigenvalues below rounding count as zero: their logarithms would be those of noise.
    noise = 2 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    values = torch.where(values < noise, 0.0, values)
    values = torch.where(values < rank, 1.0, values)
    return Spectrum(values, vectors, largest.log() + scale.log(), usable, matrix.dtype)


def diagonal_spectrum(values: Tensor) -> Spectrum:
    """The spectrum of a diagonal covariance, for groups of diagonal matrices.

    Args:
        values: the diagonal, `(*batch, k)`; entries that rounding has made negative count as zero.

    Example:
        >>> diagonal_spectrum(torch.tensor([1.0, 4.0])).log(0.0)
        tensor([0.0000, 1.3863])
    """
    known = values.double().clamp_min(0)
    largest = known.amax(-1).clamp_min(torch.finfo(values.dtype).tiny)
    return Spectrum(known / largest.unsqueeze(-1), None, largest.log(), largest.isfinite(), values.dtype)


def symmetric_log(matrix: Tensor, shift: float | None = None, rank: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Logarithm of positive semidefinite matrices, $\log(A + \epsilon\,\lambda_{\max} 1)$, in float64.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.
        shift: $\epsilon$, relative to the largest eigenvalue; `relative_shift` of the dtype if not given.
        rank: as in `symmetric_spectrum`.

    Returns:
        The logarithms, `(*batch, k, k)`, and the logarithms of the eigenvalues in ascending order, `(*batch, k)`,
        both in the dtype of the input.

    Example:
        >>> log, _ = symmetric_log(torch.diag(torch.tensor([1.0, 4.0])))
        >>> bool(torch.allclose(log, torch.diag(torch.tensor([0.0, 1.3863])), atol=1e-4))
        True
    """
    spectrum = symmetric_spectrum(matrix, rank)
    added = relative_shift(matrix.dtype) if shift is None else shift
    return spectrum.log(added), spectrum.logs(added)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors and where they converged; where a stack fails, its matrices are tried one by one."""
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


def polar_factors(tensors: Sequence[Tensor]) -> list[Tensor]:
    r"""Nearly $U V^\top$ of matrices $U \Sigma V^\top$ of one shape, by five steps of an odd polynomial.

    $$X \mapsto a X + (b\, X X^\top + c\, (X X^\top)^2)\, X, \qquad X_0 = G / |G|_F.$$

    Singular values down to a few hundredths of the Frobenius norm end up between 0.6 and 1.3, smaller ones grow by 3.4
    a step: nothing is divided by a number near zero, and the derivative is finite everywhere. In float32 without a
    graph the products are in bfloat16, where the device is fast in it: its rounding is small beside that range.

    Args:
        tensors: each `(*batch, rows, columns)` with one batch dimension; the further dimensions of a convolution's
            kernel count as columns.

    Returns:
        Of the same shapes; zero where a tensor is zero.

    Example:
        >>> (polar,) = polar_factors([torch.diag(torch.tensor([3.0, 1.0]).double()).unsqueeze(0)])
        >>> polar.diagonal(dim1=-2, dim2=-1).round(decimals=1)
        tensor([[0.8000, 1.1000]], dtype=torch.float64)

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    first = tensors[0]
    matrices = torch.cat([value.flatten(2) for value in tensors])
    wide = matrices.shape[-2] <= matrices.shape[-1]
    found = matrices if wide else matrices.mT
    smallest = torch.finfo(first.dtype).tiny ** 0.5
    found = found / (torch.linalg.matrix_norm(found, keepdim=True).square() + smallest).sqrt()
    large = found.shape[-2] >= _HALVES
    if large and first.dtype == torch.float32 and not found.requires_grad and _multiplies_halves(first.device):
        found = found.bfloat16()
    a, b, c = _COEFFICIENTS
    for _ in range(_POLAR_STEPS):
        gram = torch.bmm(found, found.mT)
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    found = (found if wide else found.mT).to(first.dtype)
    return [each.reshape(first.shape) for each in found.split(first.shape[0])]


def alike(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors grouped by shape, in chunks of bounded memory, each for one call of `polar_factors`.

    Example:
        >>> list(alike({"a": torch.ones(1, 2, 3), "b": torch.ones(1, 3, 2), "c": torch.ones(1, 2, 3)}))
        [['a', 'c'], ['b']]
    """
    groups: dict[torch.Size, list[str]] = {}
    for name, value in tensors.items():
        groups.setdefault(value.shape, []).append(name)
    for names in groups.values():
        some = max(1, _CHUNK // tensors[names[0]].nbytes)
        yield from (names[start : start + some] for start in range(0, len(names), some))


@functools.cache
def _multiplies_halves(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fit(scale: Tensor, tensor: Tensor) -> Tensor:
    """A `(tasks,)` factor shaped so that it multiplies a tensor of the stack."""
    return scale.reshape(*scale.shape, *(1,) * (tensor.ndim - scale.ndim))


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of each task's tensor, `(tasks,)`."""
    square = tensor.square().reshape(tensor.shape[0], -1).mean(-1)
    return square.clamp_min(torch.finfo(tensor.dtype).tiny).sqrt()


def finite_gradient(tensor: Tensor) -> Tensor:
    """The tensor as it is; backwards, entries of its gradient that are not finite become zero.

    It stands where a network's outputs, one row for each task, leave the network. In one task the derivative of a
    factorisation can be infinite, as that of a matrix that has lost its rank; the other tasks' gradients stay usable.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> (finite_gradient(x) * torch.tensor([2.0, float("inf")])).sum().backward()
        >>> x.grad
        tensor([2., 0.])
    """
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor)
        tensor.register_hook(_finite)
    return tensor


def _finite(gradient: Tensor) -> Tensor:
    return torch.nan_to_num(gradient, 0.0, 0.0, 0.0)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor that has an entry which is not finite; empty if there is none.

    Example:
        >>> first_not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])})
        'b'
    """
    # One by one: a model may have them on several devices.
    return next((name for name, value in tensors.items() if not bool(all_finite([value], batch=0))), "")


def all_finite(tensors: Iterable[Tensor], batch: int = 1) -> Tensor:
    """Where all entries of all tensors are finite, boolean, of the shape of their batch dimensions.

    Args:
        tensors: `(*batch, ...)`, at least one.
        batch: number of batch dimensions in front.

    Example:
        >>> all_finite([torch.ones(2, 3), torch.tensor([[1.0], [float("nan")]])])
        tensor([ True, False])
    """
    kept = [value.detach() for value in tensors]
    # A sum is finite where its terms are, unless it overflows, and is ten times as fast as testing each of them.
    sums = torch.stack([value.reshape(*value.shape[:batch], -1).sum(-1) for value in kept]).isfinite().all(0)
    if bool(sums.all()):
        return sums
    return torch.stack([value.isfinite().reshape(*value.shape[:batch], -1).all(-1) for value in kept]).all(0)


def squarable(tensors: Iterable[Tensor], batch: int = 1) -> Tensor:
    """Where the squares of all tensors can be summed up, boolean, of the shape of their batch dimensions.

    What is not finite cannot, nor what is so large that its squares are infinite in its precision, by a factor of a
    thousand or less: a running mean of squares that is infinite once stays so.

    Args:
        tensors: `(*batch, ...)`, at least one.
        batch: number of batch dimensions in front.

    Example:
        >>> squarable([torch.ones(3, 2), torch.tensor([[1.0], [float("nan")], [1e20]])])
        tensor([ True, False, False])
    """
    within = [
        torch.linalg.vector_norm(value.detach().reshape(*value.shape[:batch], -1), dim=-1) < _largest(value.dtype)
        for value in tensors
    ]
    return torch.stack(within).all(0)


def _largest(dtype: torch.dtype) -> float:
    return 1e-3 * torch.finfo(dtype).max ** 0.5


def quick_spectrum(matrix: Tensor, rank: float = 0.0) -> Spectrum:
    """As `symmetric_spectrum`, in the matrix's own precision: in float32 for half of the time.

    Eigenvalues are right to rounding relative to the largest, and those below rounding count as zero in both.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.
        rank: as in `symmetric_spectrum`.

    Example:
        >>> quick_spectrum(torch.diag(torch.tensor([2.0, 4.0]))).values
        tensor([0.5000, 1.0000])
    """
    symmetric = (matrix + matrix.mT) / 2
    tiny = torch.finfo(matrix.dtype).tiny
    scale = torch.diagonal(symmetric, dim1=-2, dim2=-1).amax(-1).clamp_min(tiny)
    try:
        values, vectors = torch.linalg.eigh(symmetric / scale[..., None, None])
    except torch.linalg.LinAlgError:
        # Too few digits, or what is not finite: there it is looked at matrix by matrix.
        return symmetric_spectrum(matrix, rank)
    usable = values.isfinite().all(-1)
    largest = values[..., -1].clamp_min(tiny)
    values = values / largest.unsqueeze(-1)
    noise = 2 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    values = torch.where(values < noise, 0.0, values)
    values = torch.where(values < rank, 1.0, values)
    return Spectrum(values, vectors, largest.double().log() + scale.double().log(), usable, matrix.dtype)


def eigen(generator: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices in their own precision; zeros where there are none to be had.

    So a generator that cannot be decomposed counts as zero.

    Args:
        generator: `(*batch, k, k)`.

    Returns:
        Eigenvalues in ascending order, `(*batch, k)`, and eigenvectors in columns, `(*batch, k, k)`.

    Example:
        >>> eigen(torch.diag(torch.tensor([2.0, 1.0])))[0]
        tensor([1., 2.])
    """
    values, vectors, converged = _eigh(generator)
    usable = converged & values.isfinite().all(-1)
    return torch.where(usable.unsqueeze(-1), values, 0.0), vectors
