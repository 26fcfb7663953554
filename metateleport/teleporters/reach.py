"""The bound on all teleports together: how far they may lead from where a model began."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metateleport.groups import Group, PositiveDiagonal, VectorGroup

__all__ = ["check_max_stretch", "shortened", "stretch", "within_reach"]


_AT_THE_BOUND = 0.99


def check_max_stretch(max_stretch: float | None) -> None:
    """Checks a bound.

    Args:
        max_stretch: a factor; None for no bound.

    Raises:
        ValueError: if it is not above one.

    Example:
        >>> check_max_stretch(0.5)
        Traceback (most recent call last):
        ValueError: max_stretch is a factor above one, or None for no bound; not 0.5
    """
    if max_stretch is not None and not 1 < max_stretch < math.inf:
        raise ValueError(f"max_stretch is a factor above one, or None for no bound; not {max_stretch!r}")


def stretch(group: Group, element: Tensor) -> Tensor:
    r"""$\max(\log \|g\|_2, \log \|g^{-1}\|_2)$: log of the largest factor by which $g$ stretches or shrinks anything.

    It measures the distance of $g$ from the identity: zero only for rotations, equal for $g$ and $g^{-1}$, and
    subadditive for products. The condition number does not serve, as it ignores that one layer may grow and the next
    one shrink as a whole. For a translation $t$ it is $\log(1 + \max_i |t_i|)$.

    Args:
        group: the group.
        element: $g$, `(*batch, *group.shape)`.

    Returns:
        `(*batch,)`; infinite where it is not finite or singular.

    Example:
        >>> stretch(PositiveDiagonal(2), torch.tensor([0.5, 1.0])).exp()
        tensor(2.)
    """
    if isinstance(group, PositiveDiagonal):
        largest = element.log().abs().amax(-1)
    elif isinstance(group, VectorGroup):
        largest = element.abs().amax(-1).log1p()
    else:
        finite = group.expand(element.isfinite().flatten(-2).all(-1))
        singular = torch.linalg.svdvals(torch.where(finite, element, torch.zeros_like(element)))
        largest = singular.log().abs().amax(-1)
    return torch.nan_to_num(largest, math.inf, math.inf, math.inf)


def within_reach(group: Group, generator: Tensor, reached: Tensor, bound: float) -> Tensor:
    r"""The part of a generator $T$ that leads no further than a bound, $\exp(T') g$ with a stretch of at most $b$.

    For a diagonal group each entry is cut by itself. For other groups the whole generator is shortened to
    $\|T'\|_2 \le b - \mathrm{stretch}(g)$, unless it ends within the bound anyway; a move towards the identity is never
    shortened. If $g$ is beyond the bound already, its own stretch is the bound.

    Args:
        group: the group.
        generator: $T$, `(*batch, *group.shape)`.
        reached: $g$, the product of all elements so far, of the same shape.
        bound: $b$, a logarithm.

    Returns:
        $T'$, of the same shape; the derivative in $T$ is kept.

    Example:
        >>> here = torch.tensor([0.9, -0.5]).exp()
        >>> within_reach(PositiveDiagonal(2), torch.tensor([0.3, 0.3]), here, 1.0)
        tensor([0.1000, 0.3000])
    """
    if isinstance(group, PositiveDiagonal):
        place = reached.log()
        allowed = place.abs().clamp_min(bound)
        return (place + generator).clamp(-allowed, allowed) - place
    fixed, before = generator.detach(), stretch(group, reached)
    inside = stretch(group, group.compose(group.exp(fixed), reached)) <= before.clamp_min(bound)
    length = torch.linalg.matrix_norm(fixed, 2).clamp_min(torch.finfo(fixed.dtype).tiny)
    share = ((bound - before) / length).clamp(0.0, 1.0)
    return generator * group.expand(torch.where(inside, torch.ones_like(share), share))


def shortened(group: Group, element: Tensor, reached: Tensor, bound: float) -> Tensor:
    r"""The element nearest to $g$ that leads no further than a bound, $g' h$ with a stretch of at most $b$.

    Diagonals and translations are clipped entry by entry, matrices at the singular values of $g h$, which keeps the
    rotations in it. At the bound a matrix that leads outwards becomes the identity: clipped again and again, it would
    rotate the weights at every step without getting anywhere. If $h$ is beyond the bound already, its own stretch is
    the bound.

    Args:
        group: the group.
        element: $g$, of shape `group.shape`.
        reached: $h$, the product of all elements so far.
        bound: $b$, a logarithm.

    Returns:
        $g'$; $g$ itself where it leads to within the bound, or is not finite.

    Example:
        >>> shortened(PositiveDiagonal(2), torch.tensor([4.0, 0.5]), torch.tensor([2.0, 1.0]), math.log(4))
        tensor([2.0000, 0.5000])
    """
    if not bool(element.isfinite().all()):
        return element
    before = float(stretch(group, reached))
    bound = max(bound, before)
    there = group.compose(element, reached)
    if float(stretch(group, there)) <= bound * (1 + 1e-6):
        return element
    if isinstance(group, PositiveDiagonal):
        return there.log().clamp(-bound, bound).exp() / reached
    if isinstance(group, VectorGroup):
        return there.clamp(-math.expm1(bound), math.expm1(bound)) - reached
    if before > _AT_THE_BOUND * bound:
        return group.identity(dtype=element.dtype, device=element.device)
    left, singular, right = torch.linalg.svd(there.double())
    cut = singular.log().clamp(-bound, bound).exp()
    return ((left * cut) @ right @ torch.linalg.inv(reached.double())).to(element.dtype)
