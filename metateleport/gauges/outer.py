"""Outer gauges: what the rows of a factor are seen in, from a sketch of the second moments of its gradients."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metateleport.gauges.polar import polar_of_gram
from metateleport.linalg import symmetric_spectrum

__all__ = ["OuterGauge", "length_ratio", "outer_gauge", "polar_in_outer", "sketch_width", "sketched"]

_LEAST = 16
"""Smallest number of columns of a sketch, where there are as many rows."""

_FLOOR = 1e-3
"""What is added to the second moments, relative to the largest: those that no sketch has seen count as that much."""


def sketch_width(size: int, rows: int) -> int:
    """Number of columns of the sketch for a factor of so many columns and rows: twice the columns, but 16 at least.

    Example:
        >>> sketch_width(4, 96), sketch_width(16, 96), sketch_width(4, 10)
        (16, 32, 10)
    """
    return min(rows, max(2 * size, _LEAST))


_SHORTEST = (1 + 1 / _FLOOR) ** -0.5
"""The smallest eigenvalue of $P^2$."""


@torch.no_grad()
def sketched(sketch: Tensor, seen: Tensor, memory: Tensor) -> Tensor:
    r"""Adds gradients to a sketch: $S S^\top$ is the running mean of $Y Y^\top$, but for its smallest directions.

    Args:
        sketch: $S$, `(batch, n, q)`.
        seen: $Y = G F$, the gradients in the gauge, `(batch, n, m)`.
        memory: of the running mean, `(batch,)`; one leaves the sketch as it is.

    Returns:
        The new sketch, of orthogonal columns. It does not depend on which gauge of those with the same metric
        $F F^\top$ is taken, but for the signs of its columns.

    Example:
        >>> found = sketched(torch.zeros(1, 3, 2), torch.tensor([[[2.0], [0.0], [0.0]]]), torch.tensor([0.75]))
        >>> (found @ found.mT)[0].round(decimals=5)
        tensor([[1., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])

    Source: Feinberg et al., "Sketchy: memory-efficient adaptive regularization with frequent directions", NeurIPS 2023
    (arXiv 2302.03764).
    """
    memory = memory.to(seen)[:, None, None]
    both = torch.cat((sketch.to(seen) * memory.sqrt(), seen * (1 - memory).sqrt()), -1).double()
    spectrum = symmetric_spectrum(both.mT @ both)
    assert spectrum.vectors is not None
    found = (both @ spectrum.vectors[..., -sketch.shape[-1] :]).to(sketch.dtype)
    kept = found.isfinite().all(-1).all(-1) & (memory < 1).flatten()
    return torch.where(kept[:, None, None], found, sketch)


@dataclasses.dataclass(frozen=True)
class OuterGauge:
    r"""$P_t = (1 + L / \rho)^{-t / 4}$ of the second moments $L = S S^\top$, $\rho$ a thousandth of the largest.

    Args:
        values: eigenvalues of $L$ over $\rho$, `(batch, q)`.
        floor: $\rho$, `(batch,)`.
    """

    values: Tensor
    floor: Tensor

    def weights(self, power: Tensor | float) -> Tensor:
        r"""$w$ with $(1 + L / \rho)^{-p} = 1 + S\,\mathrm{diag}(w)\,S^\top$, `(batch, q)`.

        Args:
            power: $p$, a number or `(batch, 1)`.
        """
        scale = self.values * self.floor.unsqueeze(-1)
        tiny = torch.finfo(scale.dtype).tiny
        known = scale > tiny
        grown = torch.expm1(-power * self.values.log1p())
        return torch.where(known, grown / torch.where(known, scale, 1.0), 0.0)


@torch.no_grad()
def outer_gauge(sketch: Tensor) -> OuterGauge:
    """The gauge that a sketch makes.

    Args:
        sketch: as `sketched` gives it.

    Example:
        >>> sketch = torch.tensor([[[3.0], [0.0]]])
        >>> gauge = outer_gauge(sketch)
        >>> p = torch.eye(2) + sketch @ (gauge.weights(0.25).unsqueeze(-1) * sketch.mT)
        >>> bool(torch.allclose(p[0], torch.diag(torch.tensor([1001.0**-0.25, 1.0]))))
        True
    """
    values = sketch.square().sum(-2)
    floor = _FLOOR * values.amax(-1) + torch.finfo(values.dtype).tiny ** 0.5 * _FLOOR
    return OuterGauge(values / floor.unsqueeze(-1), floor)


def polar_in_outer(seen: Tensor, sketch: Tensor) -> Tensor:
    r"""The polar factor taken in an outer gauge and brought home: $P\,\mathrm{polar}(P\,Y)$, as long as a polar factor.

    Args:
        seen: $Y$, `(batch, n, k)`.
        sketch: makes $P$.

    Example:
        >>> y = torch.randn(1, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> from metateleport.gauges import polar_by_gram
        >>> bool(torch.allclose(polar_in_outer(y, torch.zeros_like(y)), polar_by_gram(y)))
        True

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned stochastic tensor optimization", ICML 2018 (arXiv
    1802.09568), for the metric of the rows.
    """
    inside, outer = sketch.mT @ seen, outer_gauge(sketch)
    square, gram = outer.weights(0.5).unsqueeze(-1), seen.mT @ seen
    once = gram + inside.mT @ (square * inside)
    twice = gram + inside.mT @ (outer.weights(1.0).unsqueeze(-1) * inside)
    polar = polar_of_gram(once)
    step = seen @ polar + sketch @ (square * (inside @ polar))
    return step * length_ratio(once, twice, polar)[:, None, None]


def length_ratio(once: Tensor, twice: Tensor, made: Tensor) -> Tensor:
    r"""$|P Y A| / |P^2 Y A|$ for $A$, from the Gram matrices of $P Y$ and of $P^2 Y$, `(batch,)`; zero for zero."""
    tiny = torch.finfo(made.dtype).tiny
    above, below = ((gram @ made).mul(made).sum((1, 2)).clamp_min(0.0) for gram in (once, twice))
    # So much shorter P makes a vector at most: below that is rounding, where momenta are not of full rank.
    below = torch.maximum(below, above * _SHORTEST)
    known = (below > tiny) & (above > tiny)
    # The root of zero has no finite slope.
    return torch.where(known, torch.where(known, above, 1.0) / torch.where(known, below, 1.0), 1.0).sqrt() * known
