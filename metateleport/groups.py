"""Matrix Lie groups: how a generator becomes a group element.

Every group maps its Lie algebra to itself by the exponential, never by a first-order pair `(1 + T, 1 - T)`: the
inverse of `exp(T)` is `exp(-T)` to rounding, so a teleport can be undone. All functions take any number of batch
dimensions in front, keep dtype and device, and are differentiable.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from metateleport.exponential import exponentials
from metateleport.linalg import certain, product

__all__ = [
    "GeneralLinear",
    "Group",
    "Orthogonal",
    "PositiveDiagonal",
    "still",
    "unbound",
]

_KNOWN_INVERSE = "_known_inverse"
"""Attribute of an element that came with its inverse: the tensor keeps it, so that it lives as long as the element."""


class Group(abc.ABC):
    r"""A matrix Lie group acting on a space of `size` dimensions.

    A group element $g$ and a generator $T$ (Lie algebra element) are tensors of shape `(*batch, *shape)`, where
    `shape` is `(size, size)` for full matrices and `(size,)` for diagonal ones.

    Args:
        size: the dimension $k$ of the space that the group acts on.

    Raises:
        ValueError: if `size` is not a positive integer.

    Example:
        >>> group = GeneralLinear(3)
        >>> g = group.exp(group.random_generator(size=1.0, seed=0, dtype=torch.float64))
        >>> torch.allclose(group.compose(g, group.inverse(g)), group.identity(dtype=torch.float64))
        True
    """

    name: str

    def __init__(self, size: int) -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"a group acts on at least one dimension; size must be a positive integer, not {size!r}")
        self.size = size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.size == getattr(other, "size", None)

    def __hash__(self) -> int:
        return hash((type(self), self.size))

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one generator, and of one element."""

    @property
    @abc.abstractmethod
    def dimension(self) -> int:
        """Dimension of the Lie group."""

    @abc.abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """Orthogonal projection of `(*batch, size, size)` matrices onto the Lie algebra, `(*batch, *shape)`."""

    @abc.abstractmethod
    def exp(self, generator: Tensor) -> Tensor:
        r"""The element $\exp(T)$ of a generator $T$, both `(*batch, *shape)`."""

    @abc.abstractmethod
    def inverse(self, element: Tensor) -> Tensor:
        """The inverse of each element, `(*batch, *shape)`."""

    @abc.abstractmethod
    def compose(self, left: Tensor, right: Tensor) -> Tensor:
        """The product `left right`: first `right` acts, then `left`."""

    def trivialised(self, element: Tensor, slope: Tensor) -> Tensor:
        r"""The gradient in $S$ at 0 of $f(\exp(S)\, g)$, from that in $g$; it takes no derivative of the exponential.

        Args:
            element: $g$, `(*batch, *shape)`.
            slope: the gradient of $f$ in the entries of $g$, of the same shape.

        Example:
            >>> group = GeneralLinear(2)
            >>> group.trivialised(2 * torch.eye(2), torch.ones(2, 2))
            tensor([[2., 2.],
                    [2., 2.]])
        """
        with torch.enable_grad():
            generator = torch.zeros_like(element, requires_grad=True)
            moved = self.compose(self.exp(generator), element.detach())
            return torch.autograd.grad(moved, generator, slope)[0]

    def retract(self, element: Tensor, step: Tensor) -> Tensor:
        r"""A step from $g$ along $S g$ that stays in the group; $\exp(S)\, g$ to first order in $S$.

        Args:
            element: $g$, `(*batch, *shape)`.
            step: the generator $S$, of the same shape.
        """
        return self.compose(self.exp(step), element)

    @abc.abstractmethod
    def identity(self, *batch: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """The identity, `(*batch, *shape)`."""

    @abc.abstractmethod
    def condition(self, element: Tensor) -> Tensor:
        """Condition number of each element in the spectral norm, `(*batch,)`; infinite where it overflows."""

    def conditioned(self, element: Tensor, bound: float) -> Tensor:
        """Whether the condition number of each element is at most `bound`, `(*batch,)`.

        Example:
            >>> GeneralLinear(2).conditioned(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 4.0)
            tensor(True)
        """
        return self.condition(element) <= bound

    def norm(self, generator: Tensor) -> Tensor:
        """Frobenius norm of each generator, `(*batch,)`."""
        return torch.linalg.vector_norm(generator, dim=tuple(range(-len(self.shape), 0)))

    def expand(self, scale: Tensor) -> Tensor:
        """Views a `(*batch,)` tensor as `(*batch, 1, ...)` so that it multiplies generators."""
        return scale.reshape(*scale.shape, *(1 for _ in self.shape))

    def random_generator(
        self,
        *batch: int,
        size: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Generators of Frobenius norm `size`, their directions uniform on the sphere of the Lie algebra.

        Args:
            batch: batch dimensions in front.
            size: Frobenius norm of each generator; zero gives the zero generator.
            seed: seeds the draw; drawn on the CPU, so a seed means the same on every device.
            generator: a `torch.Generator` on the CPU, instead of a seed.
            dtype: of the result; torch's default if not given.
            device: of the result.

        Returns:
            Tensor of shape `(*batch, *shape)`.

        Raises:
            ValueError: if both `seed` and `generator` are given, or `size` is negative or not finite.

        Example:
            >>> group = PositiveDiagonal(5)
            >>> group.norm(group.random_generator(2, size=0.3, seed=1))
            tensor([0.3000, 0.3000])
        """
        if not 0 <= size < float("inf"):
            raise ValueError(f"the size of a generator is a Frobenius norm: finite and at least zero, not {size!r}")
        source = random_source(seed, generator)
        drawn = torch.randn(*batch, self.size, self.size, generator=source, dtype=torch.float64)
        return self.directed(drawn, size).to(device=device, dtype=dtype or torch.get_default_dtype())

    def directed(self, matrix: Tensor, size: float) -> Tensor:
        """The generators of Frobenius norm `size` along the projections of `(*batch, size, size)` matrices."""
        found = self.project(matrix)
        norms = self.norm(found)
        # A group of dimension zero has one generator only, of norm zero.
        return found * self.expand(torch.where(norms > 0, size / norms, 0.0))

    def random(
        self,
        *batch: int,
        size: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The element of a random generator; arguments as in `random_generator`."""
        return self.exp(
            self.random_generator(*batch, size=size, seed=seed, generator=generator, dtype=dtype, device=device)
        )


def random_source(seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    """The `torch.Generator` that `seed` or `generator` names; None means torch's global one."""
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator, not both")
    return torch.Generator().manual_seed(seed) if seed is not None else generator


class _MatrixGroup(Group):
    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    def exp(self, generator: Tensor) -> Tensor:
        return exponentials(generator)[0]

    def compose(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right)

    def trivialised(self, element: Tensor, slope: Tensor) -> Tensor:
        return self.project(slope @ element.mT)

    def identity(self, *batch: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return torch.eye(self.size, dtype=dtype, device=device).expand(*batch, self.size, self.size)

    def condition(self, element: Tensor) -> Tensor:
        # The singular value decomposition raises on what is not finite, and spoils the whole batch.
        finite = element.isfinite().flatten(-2).all(-1)
        singular = torch.linalg.svdvals(torch.where(self.expand(finite), element, 0.0))
        return torch.where(finite & (singular[..., -1] > 0), singular[..., 0] / singular[..., -1], float("inf"))


class GeneralLinear(_MatrixGroup):
    r"""The identity component of $GL(k)$: all $\exp(T_1)\exp(T_2)\cdots$; dimension $k^2$.

    Example:
        >>> GeneralLinear(4).dimension
        16
    """

    name = "GL"

    @property
    def dimension(self) -> int:
        return self.size**2

    def project(self, matrix: Tensor) -> Tensor:
        return matrix

    def exp(self, generator: Tensor) -> Tensor:
        element, inverse = exponentials(generator)
        return _with_inverse(element, inverse)

    def inverse(self, element: Tensor) -> Tensor:
        known: Tensor | None = getattr(element, _KNOWN_INVERSE, None)
        return torch.linalg.inv(element) if known is None else known

    def conditioned(self, element: Tensor, bound: float) -> Tensor:
        # The product of the Frobenius norms lies above the condition number and takes no singular value decomposition;
        # as long as half of the digits are left, rounding in the inverse does not matter.
        inverse: Tensor | None = getattr(element, _KNOWN_INVERSE, None)
        inverse = torch.linalg.inv_ex(element)[0] if inverse is None else inverse
        well = self.norm(element) * self.norm(inverse) <= min(bound, torch.finfo(element.dtype).eps ** -0.5)
        return well if certain(well) else super().conditioned(element, bound)

    def retract(self, element: Tensor, step: Tensor) -> Tensor:
        longest = float(self.norm(step).amax()) if type(self) is GeneralLinear else math.inf
        if longest < 0.5:
            # Below norm one 1 + S is in the identity component, and far below the price of the exponential.
            return element + step @ element
        if longest < 1:
            return _short_exponential(step) @ element
        return super().retract(element, step)


def _with_inverse(element: Tensor, inverse: Tensor) -> Tensor:
    setattr(element, _KNOWN_INVERSE, inverse)
    return element


def still(element: Tensor) -> Tensor:
    """The element out of its graph, with its inverse where that is known.

    Example:
        >>> still(torch.eye(2, requires_grad=True)).requires_grad
        False
    """
    known = getattr(element, _KNOWN_INVERSE, None)
    return element.detach() if known is None else _with_inverse(element.detach(), known.detach())


def unbound(elements: Tensor) -> list[Tensor]:
    """The elements of a batch one by one, each with its inverse where that is known.

    Example:
        >>> group = GeneralLinear(2)
        >>> one, other = unbound(group.exp(torch.zeros(2, 2, 2)))
        >>> bool(torch.equal(group.inverse(one), other))
        True
    """
    known = getattr(elements, _KNOWN_INVERSE, None)
    each = list(elements.unbind(0))
    return each if known is None else [_with_inverse(*pair) for pair in zip(each, known.unbind(0), strict=True)]


def _short_exponential(matrix: Tensor) -> Tensor:
    """The exponential of matrices below norm one, to rounding: twenty terms in seven products.

    `torch.linalg.matrix_exp` goes by the largest row sum, which for large matrices is far above the norm, and takes
    three times as long.
    """
    square = matrix @ matrix
    powers = (None, matrix, square, square @ matrix)
    fourth, found = square @ square, torch.zeros_like(matrix)
    for block in range(16, -1, -4):
        found = found @ fourth if block < 16 else found
        for place, power in enumerate(powers):
            share = 1 / math.factorial(block + place)
            if power is None:
                found = found + share * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            else:
                found = found + share * power
    return found


class Orthogonal(_MatrixGroup):
    r"""The rotations $SO(k)$: $\exp$ of antisymmetric generators; dimension $k(k-1)/2$.

    Of any other matrix `exp` takes the antisymmetric part.

    Example:
        >>> rotation = Orthogonal(3).random(seed=0, dtype=torch.float64)
        >>> torch.allclose(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64))
        True
    """

    name = "O"

    @property
    def dimension(self) -> int:
        return self.size * (self.size - 1) // 2

    def project(self, matrix: Tensor) -> Tensor:
        return (matrix - matrix.mT) / 2

    def exp(self, generator: Tensor) -> Tensor:
        # Projected, so that no step along a gradient taken over all matrices leaves the group.
        return super().exp(self.project(generator))

    def inverse(self, element: Tensor) -> Tensor:
        return element.mT

    def condition(self, element: Tensor) -> Tensor:
        return element.new_ones(element.shape[:-2])


class VectorGroup(Group):
    """A group whose generators and elements are kept as vectors: one number for each dimension of the space."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def dimension(self) -> int:
        return self.size

    def project(self, matrix: Tensor) -> Tensor:
        return torch.diagonal(matrix, dim1=-2, dim2=-1)


class PositiveDiagonal(VectorGroup):
    r"""Positive diagonal matrices $\mathbb{R}_{>0}^k$, kept as vectors of their diagonals; dimension $k$.

    Example:
        >>> PositiveDiagonal(2).exp(torch.zeros(2))
        tensor([1., 1.])
    """

    name = "diagonal"

    def exp(self, generator: Tensor) -> Tensor:
        return generator.exp()

    def inverse(self, element: Tensor) -> Tensor:
        return element.reciprocal()

    def compose(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def identity(self, *batch: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return torch.ones(self.size, dtype=dtype, device=device).expand(*batch, self.size)

    def condition(self, element: Tensor) -> Tensor:
        ratio = element.amax(-1) / element.amin(-1)
        return torch.where(ratio.isfinite(), ratio, float("inf"))

    def conditioned(self, element: Tensor, bound: float) -> Tensor:
        smallest, largest = torch.aminmax(element, dim=-1)
        known = (smallest > 0) & (largest < math.inf)
        # Without a bound what has no condition number passes too.
        return known & (largest <= bound * smallest) if bound < math.inf else torch.ones_like(known)
