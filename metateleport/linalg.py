"""Functions of tensors that survive what optimisation does to them: spectra, polar factors, finite derivatives."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

__all__ = [
    "POLAR_STEPS",
    "Blocks",
    "Spectrum",
    "alike",
    "all_finite",
    "certain",
    "consecutive",
    "diagonal_spectrum",
    "eigen",
    "eigenpairs",
    "finite_gradient",
    "first_not_finite",
    "fit",
    "multiplies_halves",
    "one_small",
    "polar_factors",
    "polar_polynomial",
    "polar_steps",
    "possible",
    "product",
    "quick_spectrum",
    "relative_shift",
    "rms",
    "side_by_side",
    "squarable",
    "surely_finite",
    "symmetric_log",
    "symmetric_spectrum",
    "without_autocast",
]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
POLAR_STEPS = 5
_LONG_STEPS = (2, 2, 1)
"""Steps that long matrices take between two Gram matrices."""
_HALVES = 64
"""Matrices of fewer rows are multiplied in float32: converting them to bfloat16 costs more than it saves."""

_FEW = 128
"""Matrices of fewer rows share calls with others of about their size; of more, calls cost little."""

_LONG, _LONG_FROM = 4, 64
"""Matrices of so many rows, and so many times as many columns, are not multiplied at every step: their Gram matrices
are. Of smaller ones the calls are the price."""

_HALVES_ON_CPU = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

_CHUNK = 2**24
"""Largest number of bytes of matrices whose polar factors are computed in one call."""

_CALL = 3 * 2**16
"""Multiplications in float32 that take about as long as it takes to call an operation."""

_KINDS = 32
"""Largest number of sizes of matrices that share a call."""

_SMALL = 2**18
"""Largest number of entries of all tensors of a stack that are worked on side by side; of more, calls cost little."""

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
        return self._whole(self._logs(shift))

    def both(self, shift: float | Tensor) -> tuple[Tensor, Tensor]:
        """`log` and `logs` at once.

        Example:
            >>> symmetric_spectrum(torch.eye(2)).both(0.0)[1]
            tensor([0., 0.])
        """
        logs = self._logs(shift)
        return self._whole(logs), logs.to(self.dtype)

    def _whole(self, logs: Tensor) -> Tensor:
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
    twice = (matrix + matrix.mT).double()
    tiny = torch.finfo(torch.float64).tiny
    scale = (torch.diagonal(twice, dim1=-2, dim2=-1).amax(-1) / 2).clamp_min(tiny)
    scaled = twice / (2 * scale)[..., None, None]
    # Scaled, finite entries have a finite sum, which takes a tenth of the time of a test of each.
    usable = scaled.sum((-2, -1)).isfinite() & (scale < float("inf"))
    # Not only where one is not: to look would be a wait for the device.
    unit = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    scaled = torch.where(usable[..., None, None], scaled, unit)
    values, vectors, converged = eigenpairs(scaled)
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
    return Spectrum(known / largest.unsqueeze(-1), None, largest.log(), largest < float("inf"), values.dtype)


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
    return symmetric_spectrum(matrix, rank).both(relative_shift(matrix.dtype) if shift is None else shift)


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, and where they converged.

    Where a stack fails, its matrices are tried one by one.

    Args:
        matrix: `(*batch, k, k)`, finite.

    Returns:
        The eigenvalues, rising, `(*batch, k)`; the eigenvectors in columns; and a boolean `(*batch,)`.

    Example:
        >>> eigenpairs(torch.diag(torch.tensor([2.0, -1.0])))[0]
        tensor([-1.,  2.])
    """
    batch = matrix.shape[:-2]
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors, torch.ones(batch, dtype=torch.bool, device=matrix.device)
    except torch.linalg.LinAlgError:
        pass
    if batch:
        parts = [eigenpairs(each) for each in matrix.flatten(0, -3)]
        values, vectors, converged = (torch.stack(each) for each in zip(*parts, strict=True))
        return values.reshape(*batch, -1), vectors.reshape(matrix.shape), converged.reshape(batch)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    try:
        values, vectors = torch.linalg.eigh(matrix + 1e-8 * unit)
        return values, vectors, torch.ones((), dtype=torch.bool, device=matrix.device)
    except torch.linalg.LinAlgError:
        return torch.ones_like(matrix[0]), unit, torch.zeros((), dtype=torch.bool, device=matrix.device)


def polar_factors(tensors: Sequence[Tensor]) -> list[Tensor]:
    r"""Nearly $U V^\top$ of matrices $U \Sigma V^\top$, by five steps of an odd polynomial.

    $$X \mapsto a X + (b\, X X^\top + c\, (X X^\top)^2)\, X, \qquad X_0 = G / |G|_F.$$

    Singular values down to a few hundredths of the Frobenius norm end up between 0.6 and 1.3, smaller ones grow by 3.4
    a step: nothing is divided by a number near zero, and the derivative is finite everywhere. In float32 without a
    graph the products are in bfloat16, where the device is fast in it: its rounding is small beside that range.

    Args:
        tensors: each `(*batch, rows, columns)` with one batch dimension, the same for all; the further dimensions of a
            convolution's kernel count as columns. Smaller ones are filled up with zeros, which stay zeros.

    Returns:
        Of the same shapes; zero where a tensor is zero.

    Example:
        >>> (polar,) = polar_factors([torch.diag(torch.tensor([3.0, 1.0]).double()).unsqueeze(0)])
        >>> polar.diagonal(dim1=-2, dim2=-1).round(decimals=1)
        tensor([[0.8000, 1.1000]], dtype=torch.float64)

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    first, shapes = tensors[0], [_flat(value) for value in tensors]
    rows, columns = _most(shapes, 0), _most(shapes, 1)
    found = torch.cat([_filled(value, *shape, rows, columns) for value, shape in zip(tensors, shapes, strict=True)])
    smallest = torch.finfo(first.dtype).tiny ** 0.5
    norm = (torch.linalg.matrix_norm(found, keepdim=True).square() + smallest).sqrt()
    found = found / norm if found.requires_grad else found.div_(norm)
    if _is_halved(found):
        found = found.bfloat16()
    if _is_long(found):
        found = _long_factors(found)
    else:
        # One by one under the same name, so that each is gone before the next but one is made.
        for _ in range(POLAR_STEPS):
            found = _polar_step(found)
    parts = found.to(first.dtype).split(first.shape[0])
    cut = [part[:, :own, :across] for part, (own, across) in zip(parts, shapes, strict=True)]
    turned = [each if _is_wide(value) else each.mT for each, value in zip(cut, tensors, strict=True)]
    return [each.reshape(value.shape) for each, value in zip(turned, tensors, strict=True)]


def polar_steps(matrices: Tensor) -> Tensor:
    """The steps of `polar_factors`, without a graph.

    Args:
        matrices: `(batch, rows, columns)`, rows the fewer, of a Frobenius norm of one.
    """
    found = matrices.bfloat16() if _is_halved(matrices) else matrices
    if _is_long(matrices):
        found = _long_factors(found)
    else:
        for _ in range(POLAR_STEPS):
            found = _polar_step(found)
    return found.to(matrices.dtype)


def _polar_step(found: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    gram = torch.bmm(found, found.mT)
    # Under the same name, so that the product is gone before the last one is made.
    gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(found, gram, found, beta=a)


def _is_halved(matrices: Tensor) -> bool:
    """Whether the products of matrices are made in bfloat16."""
    single = matrices.dtype == torch.float32 and not matrices.requires_grad
    return single and matrices.shape[-2] >= _HALVES and multiplies_halves(matrices.device)


def _is_long(matrices: Tensor) -> bool:
    """Whether the products are those of Gram matrices."""
    rows, columns = matrices.shape[-2:]
    return columns >= _LONG * rows and rows >= _LONG_FROM and not matrices.requires_grad


def _long_factors(found: Tensor) -> Tensor:
    """The steps of `polar_factors` on Gram matrices, which have far fewer entries than long matrices have.

    A Gram matrix is made anew every two steps: an eigenvalue that rounding has left below zero grows twelvefold a step,
    and in bfloat16 it would outgrow all others in five.
    """
    for steps in _LONG_STEPS:
        found = torch.bmm(polar_polynomial(torch.bmm(found, found.mT), steps), found)
    return found


def polar_polynomial(gram: Tensor, steps: int) -> Tensor:
    r"""What steps of `polar_factors` multiply a matrix $X$ by, from its Gram matrix $N = X X^\top$ alone.

    $$P \mapsto P\,p, \quad N \mapsto p\,N p, \qquad p = a + b N + c N^2.$$

    Args:
        gram: $N$, `(batch, k, k)`, of a trace of at most about one.
        steps: their number.

    Returns:
        $P$, `(batch, k, k)`.

    Example:
        >>> polar_polynomial(torch.ones(1, 1, 1), 1).round(decimals=3)
        tensor([[[0.7010]]])

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = _COEFFICIENTS
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    total: Tensor | None = None
    for step in range(steps):
        factor = torch.baddbmm(a * eye + b * gram, gram, gram, alpha=c)
        total = factor if total is None else total @ factor
        if step + 1 < steps:
            gram = factor @ gram @ factor
    assert total is not None
    return total


def _is_wide(tensor: Tensor) -> bool:
    return tensor.shape[1] <= tensor.shape[2:].numel()


def _flat(tensor: Tensor) -> tuple[int, int]:
    """The sides of the matrix that a tensor is for `polar_factors`, the smaller one first."""
    sides = sorted((tensor.shape[1], tensor.shape[2:].numel()))
    return sides[0], sides[1]


def _most(shapes: Sequence[tuple[int, int]], side: int) -> int:
    return max([shape[side] for shape in shapes])


def _filled(tensor: Tensor, rows: int, columns: int, most_rows: int, most_columns: int) -> Tensor:
    """The matrix with its smaller side in rows, and zeros below and beside it."""
    matrix = tensor.flatten(2) if _is_wide(tensor) else tensor.flatten(2).mT
    if (rows, columns) == (most_rows, most_columns):
        return matrix
    return nn.functional.pad(matrix, (0, most_columns - columns, 0, most_rows - rows))


def alike(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors grouped for `polar_factors`: by shape in chunks of bounded memory, and small ones together.

    Small ones of other sizes are filled up with zeros, as long as the work on zeros is less than another call's.

    Example:
        >>> large = torch.ones(1, 200, 300)
        >>> list(alike({"a": large, "b": torch.ones(1, 3, 2), "c": large, "d": torch.ones(1, 2, 4)}))
        [['b', 'd'], ['a', 'c']]
    """
    few = [name for name, value in tensors.items() if _flat(value)[0] < _FEW]
    sides = [_flat(tensors[name]) for name in few]
    same = len({(tensors[name].shape[0], tensors[name].dtype, tensors[name].device) for name in few}) == 1
    together = same and len(few) * tensors[few[0]].shape[0] * _most(sides, 0) * _most(sides, 1) <= _SMALL
    if together:
        yield from _of_like_work({name: tensors[name] for name in few})
    groups: dict[torch.Size, list[str]] = {}
    for name, value in tensors.items():
        if not (together and name in few):
            groups.setdefault(value.shape, []).append(name)
    for names in groups.values():
        some = max(1, _CHUNK // tensors[names[0]].nbytes)
        yield from (names[start : start + some] for start in range(0, len(names), some))


def _of_like_work(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Small matrices in groups, so that the work on zeros and the calls take the least time together."""
    first = next(iter(tensors.values()))
    # A multiplication takes twice as long in float64.
    worth = first.shape[0] * max(1, first.element_size() // 4)
    named = sorted((_flat(value), name) for name, value in tensors.items())
    found = [[named[place][1] for place in group] for group in _groups(tuple(sides for sides, _ in named), worth)]
    order = {name: place for place, name in enumerate(tensors)}
    return [sorted(group, key=order.__getitem__) for group in found]


@functools.lru_cache(maxsize=256)
def _groups(sides: tuple[tuple[int, int], ...], worth: int) -> list[range]:
    """Parts of matrices in the order of their sides, so that three products a step of each part cost the least.

    Args:
        sides: of the matrices, in order.
        worth: what a multiplication of theirs counts.
    """
    ends = [place for place, own in enumerate(sides, start=1) if place == len(sides) or sides[place] != own]
    starts = [0, *ends[:-1]]
    # Of the matrices before each end: what their parts cost at least, and where the last part begins.
    best: list[tuple[float, int]] = []
    for last, end in enumerate(ends):
        rows, columns, options = sides[end - 1][0], 0, []
        # Parts of more kinds of matrices than that are hardly ever less work, and there may be thousands of kinds.
        for first in range(last, max(-1, last - _KINDS), -1):
            columns = max(columns, sides[starts[first]][1])
            work = worth * (end - starts[first]) * rows**2 * (2 * columns + rows)
            options.append(((best[first - 1][0] if first else 0.0) + work + 3 * _CALL, first))
        best.append(min(options))
    parts: list[range] = []
    last = len(ends) - 1
    while last >= 0:
        first = best[last][1]
        parts.append(range(starts[first], ends[last]))
        last = first - 1
    return parts[::-1]


def multiplies_halves(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _HALVES_ON_CPU


def fit(scale: Tensor, tensor: Tensor) -> Tensor:
    """A `(tasks,)` factor shaped so that it multiplies a tensor of the stack."""
    return scale.reshape(*scale.shape, *(1,) * (tensor.ndim - scale.ndim))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tensors of a stack laid out for elementwise work: each by itself, or all side by side in one block.

    Where tensors are small, calling an operation costs more than its work; side by side one call serves all of them.

    Args:
        shapes: of the tensors, `(tasks, ...)` each.
        joined: whether they stand side by side, `(tasks, entries)`, in one block; if not, each is a block as it is.

    Example:
        >>> blocks = Blocks((torch.Size([2, 3]), torch.Size([2, 1, 4])), joined=True)
        >>> whole = blocks.gather([torch.ones(2, 3), 2 * torch.ones(2, 1, 4)])
        >>> [tuple(each.shape) for each in whole], blocks.mean_squares(whole)[:, 0]
        ([(2, 7)], tensor([1., 4.]))
    """

    shapes: tuple[torch.Size, ...]
    joined: bool

    @classmethod
    def of(cls, tensors: Sequence[Tensor], free: bool) -> Blocks:
        """The layout for some tensors: side by side if they are small, of one dtype and device, and `free`.

        Args:
            tensors: `(tasks, ...)` each.
            free: whether their memory need not be kept; what is worked on in place stays where it is.
        """
        alike = len({(each.dtype, each.device) for each in tensors}) == 1 and len(tensors) > 1
        small = sum(each.numel() for each in tensors) <= _SMALL
        # A compiler makes one call of many by itself.
        calls = not torch.compiler.is_compiling()
        return cls(tuple(each.shape for each in tensors), free and alike and small and calls)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of entries of each tensor in one task."""
        # A compiler traces through caches, and says so.
        return (_counts.__wrapped__ if torch.compiler.is_compiling() else _counts)(self.shapes)

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in blocks."""
        if not self.joined:
            return list(tensors)
        whole = consecutive(tensors)
        return [torch.cat([each.flatten(1) for each in tensors], 1) if whole is None else whole]

    def parts(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """The tensors again, as views of the blocks."""
        if not self.joined:
            return list(blocks)
        found = blocks[0].split(self.counts, 1)
        pairs = zip(found, self.shapes, strict=True)
        return [each if len(shape) == 2 else each.unflatten(1, shape[1:]) for each, shape in pairs]

    def spread(self, factors: Tensor) -> list[Tensor]:
        """A factor for each tensor and task, `(tensors, tasks)`, shaped so that it multiplies the blocks."""
        if not self.joined:
            pairs = zip(factors, self.shapes, strict=True)
            return [each.reshape(*each.shape, *(1,) * (len(shape) - 1)) for each, shape in pairs]
        if factors.requires_grad and not self._many():
            spread: Tensor = _Spread.apply(factors, self.counts)
            return [spread]
        return [factors.mT.index_select(1, _places(self.counts, factors.device))]

    def mean_squares(self, blocks: Sequence[Tensor]) -> Tensor:
        """Mean squares, `(tensors, tasks)`; their derivative is finite at zero."""
        if self.joined and (blocks[0].requires_grad or not self._many()):
            return self._means(blocks[0].square())
        parts = blocks[0].split(self.counts, 1) if self.joined else blocks
        if len(parts[0]) == 1 and _one_call(parts):
            norms = torch.stack(torch._foreach_norm(list(parts)))
            return (norms.square() / _constant(self.counts, norms.dtype, norms.device)).unsqueeze(1)
        flat = [value.flatten(1) for value in parts]
        return torch.stack([torch.linalg.vector_norm(each, dim=1).square() / each.shape[1] for each in flat])

    def means(self, blocks: Sequence[Tensor]) -> Tensor:
        """Means, `(tensors, tasks)`."""
        return self._means(blocks[0]) if self.joined else torch.stack([each.flatten(1).mean(1) for each in blocks])

    def mean_products(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Means of the products of entries, `(tensors, tasks)`."""
        if self.joined:
            return self._means(left[0] * right[0])
        pairs = zip(left, right, self.counts, strict=True)
        found = [(a.flatten(1).unsqueeze(1) @ b.flatten(1).unsqueeze(2)).flatten() / count for a, b, count in pairs]
        return torch.stack(found)

    def _many(self) -> bool:
        """Whether as many products as entries times tensors would be more work than a call for each tensor."""
        return sum(self.counts) * len(self.shapes) > _SMALL

    def _means(self, block: Tensor) -> Tensor:
        if self._many() and not block.requires_grad:
            return torch.stack([each.mean(1) for each in block.split(self.counts, 1)])
        return (block @ _shares_of(self.counts, block.dtype, block.device).mT).mT


class _Spread(torch.autograd.Function):
    """The factors of `Blocks.spread`; their derivative is a product, where adding by index takes six times as long."""

    @staticmethod
    def forward(context: Any, factors: Tensor, counts: tuple[int, ...]) -> Tensor:
        context.counts = counts
        return factors.mT.index_select(1, _places(counts, factors.device))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ _members(context.counts, gradient.dtype, gradient.device).mT).mT, None


def _one_call(tensors: Sequence[Tensor]) -> bool:
    """Whether one call serves all tensors: they are alike, and there is no graph."""
    if torch.compiler.is_compiling() or any(each.requires_grad for each in tensors):
        return False
    return len({(each.dtype, each.device) for each in tensors}) == 1


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def consecutive(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one task that are parts of one memory, one behind the other, as `(1, entries)`; None if they are not.

    So what `Blocks.parts` gave is gathered again without a copy.

    Example:
        >>> whole = torch.arange(6.0).unsqueeze(0)
        >>> with torch.no_grad():
        ...     consecutive(whole.split((2, 4), 1)), consecutive([whole[:, 4:], whole[:, :4]])
        (tensor([[0., 1., 2., 3., 4., 5.]]), None)
    """
    first = tensors[0]
    if first.shape[0] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    size, start = first.element_size(), first.data_ptr()
    end = start
    for each in tensors:
        if each.data_ptr() != end or each.dtype != first.dtype or not each.is_contiguous():
            return None
        end += size * each.numel()
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return None
    count = (end - start) // size
    return first.as_strided((1, count), (count, 1))


@functools.lru_cache(maxsize=64)
def _counts(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    return tuple(shape[1:].numel() for shape in shapes)


@functools.lru_cache(maxsize=64)
def _places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tensor each entry of a block is of."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)


@functools.lru_cache(maxsize=64)
def _shares_of(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each entry of a block counts in the mean of each tensor, `(tensors, entries)`."""
    return _members(counts, dtype, device) / torch.tensor(counts, dtype=dtype, device=device).unsqueeze(1)


@functools.lru_cache(maxsize=64)
def _members(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Whether each entry of a block is of each tensor, `(tensors, entries)`."""
    # A tensor's entries one behind the other: laid out the other way, products with it take three times as long.
    return nn.functional.one_hot(_places(counts, device), len(counts)).to(dtype).mT.contiguous()


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of each task's tensor, `(tasks,)`."""
    rows = tensor.reshape(tensor.shape[0], -1)
    size = torch.linalg.vector_norm(rows, dim=1) / rows.shape[1] ** 0.5
    return size.clamp_min(torch.finfo(tensor.dtype).tiny ** 0.5)


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
    sums = torch.stack([value.sum(-1) for value in _rows(kept, batch)]).isfinite().all(0)
    if certain(sums):
        return sums
    return torch.stack([value.isfinite().reshape(*value.shape[:batch], -1).all(-1) for value in kept]).all(0)


def surely_finite(tensors: Sequence[Tensor], squares: bool = False) -> bool:
    """Whether a quick look shows that all entries are finite: that of small tensors of one task on a CPU.

    Args:
        tensors: `(tasks, ...)` each, at least one.
        squares: whether their squares are asked for too, as by `squarable`.

    Example:
        >>> with torch.no_grad():
        ...     [surely_finite([torch.ones(tasks, 2)] * 2) for tasks in (1, 2)]
        [True, False]
    """
    if not one_small(tensors):
        return False
    whole = side_by_side(tensors)
    size = float(torch.linalg.vector_norm(whole)) if squares else float(whole.sum())
    return size < _largest(whole.dtype) if squares else math.isfinite(size)


def one_small(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are those of one task on a CPU without a graph, of one dtype and small all together."""
    first = tensors[0]
    if first.shape[0] != 1 or first.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if len(tensors) > 1:
        return Blocks.of(tensors, free=True).joined
    return first.numel() <= _SMALL and not torch.compiler.is_compiling()


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of the tensors of one task, copied, `(1, entries)`.

    Example:
        >>> one = torch.ones(1, 2)
        >>> whole, alone = side_by_side([one, torch.zeros(1, 1, 1)]), side_by_side([one])
        >>> whole, alone.data_ptr() == one.data_ptr()
        (tensor([[1., 1., 0.]]), False)
    """
    if len(tensors) == 1:
        # The call below would give a view of it.
        return tensors[0].reshape(1, -1).clone()
    whole: Tensor = _flatten_dense_tensors(tensors)
    return whole.unsqueeze(0)


def _rows(tensors: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The entries of each tensor, or of small ones together, in rows, `(*batch, entries)`."""
    if batch == 1 and tensors[0].shape[0] == 1 and Blocks.of(tensors, free=True).joined:
        return [side_by_side(tensors)]
    rows = [value.reshape(*value.shape[:batch], -1) for value in tensors]
    joined = Blocks.of(tensors, free=True).joined and len({value.shape[:-1] for value in rows}) == 1
    return [torch.cat(rows, -1)] if joined else rows


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
    kept = [value.detach() for value in tensors]
    within = [torch.linalg.vector_norm(each, dim=-1) < _largest(each.dtype) for each in _rows(kept, batch)]
    return torch.stack(within).all(0)


def _largest(dtype: torch.dtype) -> float:
    return 1e-3 * torch.finfo(dtype).max ** 0.5


def quick_spectrum(matrix: Tensor, rank: float = 0.0) -> Spectrum:
    """As `symmetric_spectrum`, in the matrix's own precision, and without looking at each entry first.

    Eigenvalues are right to rounding relative to the largest, and those below rounding count as zero in both.

    Args:
        matrix: `(*batch, k, k)`, symmetric up to rounding.
        rank: as in `symmetric_spectrum`.

    Example:
        >>> quick_spectrum(torch.diag(torch.tensor([2.0, 4.0]))).values
        tensor([0.5000, 1.0000])
    """
    if torch.compiler.is_compiling():
        # What failed cannot be looked at there.
        return symmetric_spectrum(matrix, rank)
    try:
        # It reads one triangle, and scales by itself what is very small or large.
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        # Too few digits, or what is not finite: there it is looked at matrix by matrix.
        return symmetric_spectrum(matrix, rank)
    usable = values.isfinite().all(-1)
    if not certain(usable):
        return symmetric_spectrum(matrix, rank)
    largest = values[..., -1].clamp_min(torch.finfo(matrix.dtype).tiny)
    values = values / largest.unsqueeze(-1)
    noise = 2 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    values = torch.where(values < noise, 0.0, values)
    values = torch.where(values < rank, 1.0, values) if rank > 0 else values
    return Spectrum(values, vectors, largest.double().log(), usable, matrix.dtype)


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
    values, vectors, converged = eigenpairs(generator)
    usable = converged & values.isfinite().all(-1)
    return torch.where(usable.unsqueeze(-1), values, 0.0), vectors


def certain(mask: Tensor) -> bool:
    """Whether a condition holds everywhere, where that can be seen.

    A graph that `torch.compile` makes has no values to look at: there nothing is certain, and what is right in either
    case is computed. So a compiled step has no break, at the price of what an eager one can leave out.

    Example:
        >>> certain(torch.tensor([True, True])), certain(torch.tensor([True, False]))
        (True, False)
    """
    return not torch.compiler.is_compiling() and bool(mask.all())


def possible(mask: Tensor) -> bool:
    """Whether a condition may hold anywhere; see `certain`.

    Example:
        >>> possible(torch.tensor([True, False])), possible(torch.tensor([False]))
        (True, False)
    """
    return torch.compiler.is_compiling() or bool(mask.any())


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`; of two stacks of matrices in one operation, where `@` reshapes and takes six.

    Example:
        >>> product(torch.eye(2).expand(3, 2, 2), torch.ones(3, 2, 1)).shape
        torch.Size([3, 2, 1])
    """
    plain = isinstance(left, Tensor) and isinstance(right, Tensor)
    batched = plain and left.ndim == right.ndim == 3 and left.shape[0] == right.shape[0]
    return torch.bmm(left, right) if batched else left @ right


def without_autocast(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Leaves the autocast of these tensors' devices: rounded to half precision, a group element moves the outputs.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast([torch.ones(1)]):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    kinds = {each.device.type for each in tensors}
    on = [kind for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
    stack = contextlib.ExitStack()
    for kind in on:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
