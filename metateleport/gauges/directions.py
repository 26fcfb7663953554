"""Directions of a step taken in a gauge: descent, Adam's and the polar factor's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from metateleport.gauges.roots import inverse_root

__all__ = ["DIRECTIONS", "Direction", "in_gauge", "polar_by_gram", "polar_of_gram"]

Direction = Literal["polar", "adam", "descent"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def polar_of_gram(gram: Tensor) -> Tensor:
    r"""$P$ with $X P$ nearly the polar factor of $X$, from $N = X^\top X$: $k \times k$ matrices alone.

    The odd polynomial of `metateleport.linalg.polar_factors` is $P \mapsto P\,p$, $N \mapsto p\,N p$ with
    $p = a + b N + c N^2$.

    Args:
        gram: $N$, `(batch, k, k)`.

    Returns:
        $P$, `(batch, k, k)`, which is nearly $N^{-1/2}$.

    Example:
        >>> polar_of_gram(torch.full((1, 1, 1), 4.0)).shape
        torch.Size([1, 1, 1])
    """
    size = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)[..., None, None]
    size = size + torch.finfo(gram.dtype).tiny ** 0.5
    gram = gram / size
    a, b, c = _COEFFICIENTS
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    total: Tensor | None = None
    for step in range(_STEPS):
        factor = torch.baddbmm(a * eye + b * gram, gram, gram, alpha=c)
        total = factor if total is None else total @ factor
        if step < _STEPS - 1:
            gram = factor @ gram @ factor
    assert total is not None
    return total / size.sqrt()


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


def in_gauge(direction: Direction, covector: Tensor, gauge: Tensor, squares: Tensor | None = None) -> Tensor:
    r"""A direction taken in a gauge and brought home, $g^{-1} . \mathrm{step}(g . M)$.

    With $Y = M F$ and $W = F^\top V F$

    $$\text{polar: } \mathrm{polar}(Y)\, F^\top, \qquad \text{Adam: } Y W^{-1/2} F^\top, \qquad
      \text{descent: } Y F^\top = M C^{-1}.$$

    For polar factors that is $M\,(C \# M^\top M)^{-1}$, with the geometric mean of the metric $C = (F F^\top)^{-1}$ and
    the Gram matrix of $M$, for Adam's direction with that of the metric and $V$. So no root of the metric enters by
    itself, and the step is the same in every gauge that whitens the other factor. Adam's second moments are those of
    the columns with one another, as a gauge has no coordinates that are the same for every split.

    Args:
        direction: which.
        covector: $M$ at home, `(batch, n, k)`.
        gauge: $F$, `(batch, k, m)`.
        squares: $V$ at home, the running mean of $G^\top G$, `(batch, k, k)`; for Adam's direction.

    Returns:
        The direction at home, `(batch, n, k)`.

    Example:
        >>> gauge = torch.diag(torch.tensor([0.5, 1.0])).unsqueeze(0)
        >>> in_gauge("descent", torch.ones(1, 1, 2), gauge)
        tensor([[[0.2500, 1.0000]]])

    Source: Yen et al., "LoRA done RITE", ICLR 2025 (arXiv 2410.20625), for second moments of that kind.
    """
    seen = covector @ gauge
    if direction == "polar":
        return polar_by_gram(seen) @ gauge.mT
    if direction == "adam":
        assert squares is not None
        return seen @ (inverse_root(gauge.mT @ squares @ gauge) @ gauge.mT)
    return seen @ gauge.mT
