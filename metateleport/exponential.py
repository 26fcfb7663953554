"""The exponential of matrices and its inverse, from one pair of series: products alone, forwards and backwards."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from metateleport.linalg import product, without_autocast

__all__ = ["exponentials"]

_SERIES: dict[torch.dtype, tuple[tuple[float, int, int], ...]] = {
    torch.float64: ((0.1, 4, 2), (0.4, 6, 3), (0.9, 8, 4), (1.5, 10, 5)),
    torch.float32: ((0.18, 2, 2), (0.45, 3, 3), (0.8, 4, 2), (1.8, 6, 3)),
}
"""Up to a root of the square's norm, to rounding: both series' degree in the square, and its powers in a block."""


def exponentials(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\exp(T)$ and its inverse $\exp(-T)$, to rounding, from one series.

    $$\exp(\pm T) = E(T^2) \pm T\,O(T^2), \qquad E(S) = \sum_j \frac{S^j}{(2j)!}, \quad
      O(S) = \sum_j \frac{S^j}{(2j+1)!},$$

    both series evaluated side by side in blocks, after a division of $T$ by a power of two that squaring makes up for.
    It takes products alone, as does its derivative; that of `torch.linalg.matrix_exp` is the exponential of a matrix of
    twice the size, at six times the price.

    Args:
        matrix: $T$, `(*batch, k, k)`. All matrices of a batch are divided by the same power of two.

    Returns:
        Both, of the same shape; NaN where an entry is not finite.

    Example:
        >>> element, inverse = exponentials(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> element.tolist(), inverse.tolist()
        ([[1.0, 1.0], [0.0, 1.0]], [[1.0, -1.0], [0.0, 1.0]])

    Source: Paterson and Stockmeyer, SIAM J. Comput. 2, 1973, for the blocks; Higham, SIAM J. Matrix Anal. Appl. 26,
    2005, for the squaring.
    """
    if torch.compiler.is_compiling():
        return _by_torch(matrix)
    with without_autocast([matrix]):
        return _exponentials(matrix)


def _exponentials(matrix: Tensor) -> tuple[Tensor, Tensor]:
    series = _SERIES.get(matrix.dtype)
    if series is None or not matrix.numel() or _is_transformed():
        return _by_torch(matrix)
    square = product(matrix.detach(), matrix.detach())
    size = _size(square)
    if not size < math.inf:
        return _by_torch(matrix)
    halvings = max(0, math.frexp(size / series[-1][0])[1])
    degree, block = next(rest for norm, *rest in series if size <= norm * 2**halvings)
    if halvings:
        # Twice, as the square of this power of two may be beyond floating-point numbers.
        power = 2.0**halvings
        matrix, square = matrix / power, square / power / power
    element, inverse = _Series.apply(matrix, square, degree, block)
    for _ in range(halvings):
        element, inverse = element @ element, inverse @ inverse
    return element, inverse


def _by_torch(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.matrix_exp(matrix), torch.linalg.matrix_exp(-matrix)


def _size(square: Tensor) -> float:
    r"""$\|T^2\|^{1/2}$, the largest of a batch: all that the series depend on, and never above $\|T\|$."""
    rows = square.abs().sum(-1).amax()
    return float(rows.minimum(torch.linalg.matrix_norm(square).amax()).sqrt())


def _is_transformed() -> bool:
    """Whether this runs inside a function transform of `torch.func`, where numbers cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Series(torch.autograd.Function):
    """`exponentials` of matrices that need no halving; their square is given, and the derivative is that of both.

    By hand, as the graph of the single products would take twice the operations and three times the memory.
    """

    @staticmethod
    def forward(context: Any, matrix: Tensor, square: Tensor, degree: int, block: int) -> tuple[Tensor, Tensor]:
        shape = matrix.shape
        flat, square = matrix.reshape(-1, *shape[-2:]), square.reshape(-1, *shape[-2:])
        # One block of memory for all powers, and one for all terms, so that one product makes the terms of the powers.
        powers = square.new_empty(block, *square.shape)
        powers[0] = square
        for each in range(1, block):
            torch.bmm(powers[each - 1], square, out=powers[each])
        ones, shares = _shares(degree, block, square.dtype, square.device)
        terms = (shares.flatten(0, 1) @ powers.flatten(1)).reshape(*ones.shape, *square.shape)
        torch.diagonal(terms, dim1=-2, dim2=-1).add_(ones[:, :, None, None])
        for each in range(1, len(terms)):
            for series in (0, 1):
                terms[each, series].baddbmm_(terms[each - 1, series], powers[-1])
        even, odd = terms[-1, 0], torch.bmm(flat, terms[-1, 1])
        context.save_for_backward(matrix, powers, terms)
        context.degree, context.block = degree, block
        context.set_materialize_grads(False)
        return (even + odd).reshape(shape), (even - odd).reshape(shape)

    @staticmethod
    def backward(
        context: Any, on_element: Tensor | None, on_inverse: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        matrix, powers, terms = context.saved_tensors
        if on_element is None and on_inverse is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            # This derivative is differentiated itself.
            pairs = zip(_by_torch(matrix), (on_element, on_inverse), strict=True)
            found, given = zip(*((each, slope) for each, slope in pairs if slope is not None), strict=True)
            return torch.autograd.grad(found, matrix, given, create_graph=True)[0], None, None, None
        shape = matrix.shape
        flat = matrix.reshape(-1, *shape[-2:])
        zero = torch.zeros_like(flat)
        slopes = [zero if each is None else each.reshape(flat.shape) for each in (on_element, on_inverse)]
        _, shares = _shares(context.degree, context.block, flat.dtype, flat.device)
        on_odd = slopes[0] - slopes[1]
        on_terms = torch.empty_like(terms)
        torch.add(slopes[0], slopes[1], out=on_terms[-1, 0])
        torch.bmm(flat.mT, on_odd, out=on_terms[-1, 1])
        for each in range(len(terms) - 1, 0, -1):
            for series in (0, 1):
                torch.bmm(on_terms[each, series], powers[-1].mT, out=on_terms[each - 1, series])
        on_powers = (shares.flatten(0, 1).mT @ on_terms.flatten(0, 1).flatten(1)).reshape(powers.shape)
        for each in range(1, len(terms)):
            for series in (0, 1):
                on_powers[-1].baddbmm_(terms[each - 1, series].mT, on_terms[each, series])
        for each in range(len(powers) - 1, 0, -1):
            on_powers[each - 1].baddbmm_(on_powers[each], powers[0].mT)
            on_powers[0].baddbmm_(powers[each - 1].mT, on_powers[each])
        on_matrix = torch.bmm(on_odd, terms[-1, 1].mT)
        on_matrix.baddbmm_(on_powers[0], flat.mT).baddbmm_(flat.mT, on_powers[0])
        return on_matrix.reshape(shape), None, None, None


@functools.cache
def _shares(degree: int, block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the identity, `(blocks, 2)`, and each power, `(blocks, 2, powers)`, have in the blocks, the highest first.

    Each block is of both series, the even one first.
    """
    starts = range(degree - block, -1, -block)
    rows = [
        [0.0 if place == block and start != starts[0] else 1 / math.factorial(2 * (start + place) + odd)]
        for start in starts
        for odd in (0, 1)
        for place in range(block + 1)
    ]
    found = torch.tensor(rows, dtype=dtype, device=device).reshape(len(starts), 2, block + 1)
    return found[..., 0], found[..., 1:].contiguous()
