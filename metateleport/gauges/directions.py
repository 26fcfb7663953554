"""Directions of a step taken in a gauge: descent, Adam's, the polar factor's and Shampoo's."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from metateleport.gauges.outer import polar_in_outer
from metateleport.gauges.polar import polar_by_gram
from metateleport.gauges.roots import inverse_root

__all__ = ["DIRECTIONS", "Direction", "in_gauge"]

Direction = Literal["polar", "shampoo", "adam", "descent"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


def in_gauge(
    direction: Direction, covector: Tensor, gauge: Tensor, squares: Tensor | None = None, sketch: Tensor | None = None
) -> Tensor:
    r"""A direction taken in a gauge and brought home, $g^{-1} . \mathrm{step}(g . M)$.

    With $Y = M F$, $W = F^\top V F$ and the outer gauge $P = (1 + L / \rho)^{-1/4}$

    $$\text{polar: } \mathrm{polar}(Y)\, F^\top, \qquad
      \text{Shampoo: } P\, \mathrm{polar}(P\, Y)\, F^\top, \qquad \text{Adam: } Y W^{-1/2} F^\top, \qquad
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
        sketch: $S$ with $S S^\top$ nearly $L$, the running mean of $G F F^\top G^\top$, `(batch, n, q)`; for Shampoo's.

    Returns:
        The direction at home, `(batch, n, k)`.

    Example:
        >>> import torch
        >>> gauge = torch.diag(torch.tensor([0.5, 1.0])).unsqueeze(0)
        >>> in_gauge("descent", torch.ones(1, 1, 2), gauge)
        tensor([[[0.2500, 1.0000]]])

    Source: Yen et al., "LoRA done RITE", ICLR 2025 (arXiv 2410.20625), for second moments of that kind; for Shampoo's
    metric as `metateleport.gauges.outer`.
    """
    seen = covector @ gauge
    if direction == "polar":
        return polar_by_gram(seen) @ gauge.mT
    if direction == "shampoo":
        assert sketch is not None
        return polar_in_outer(seen, sketch) @ gauge.mT
    if direction == "adam":
        assert squares is not None
        return seen @ (inverse_root(gauge.mT @ squares @ gauge) @ gauge.mT)
    return seen @ gauge.mT
