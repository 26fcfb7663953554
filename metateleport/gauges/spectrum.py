"""Gauges of the two factors of a product along its singular values, with a reach."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metateleport.gauges.factors import FactorSide
from metateleport.gauges.whitened import GaugeKind, _turn
from metateleport.linalg import symmetric_spectrum

__all__ = ["GaugeKind", "ProductGauges", "product_gauges"]


@dataclasses.dataclass(frozen=True)
class ProductGauges:
    r"""What is between two factors $X_u X_d^\top$: the gauges from each side's own white to the other's.

    Where $X_d = Q$ is orthonormal let $X_u = P \Sigma V^\top$; with $s^2 = \sigma^2 + \epsilon^2$ and $\bar s$ the
    geometric mean of $s$

    $$F_d(t) = R^\top V\, (\sigma / s^2)^t\, \bar s^{t - 1}, \qquad F_u(t) = R^{-1} V\, (s / \bar s)^{1 - t}.$$

    Args:
        start: $R^\top V$, `(batch, k, k)`.
        inverse: $R^{-1} V$, `(batch, k, k)`.
        values: $\sigma$, `(batch, k)`.
        filtered: logarithm of $\sigma / s^2$, `(batch, k)`.
        floored: logarithm of $s$, `(batch, k)`.
    """

    start: Tensor
    inverse: Tensor
    values: Tensor
    filtered: Tensor
    floored: Tensor

    def chosen(self, rows: list[int]) -> ProductGauges:
        """Those of some pairs and tasks, by their rows."""
        return ProductGauges(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def whole(self, side: FactorSide) -> Tensor:
        """The gauge that whitens the other factor, `(batch, k, k)`."""
        if side == "in":
            return self.inverse
        return self.start * self.filtered.exp().unsqueeze(-2)

    def reaching(self, side: FactorSide, reach: Tensor) -> Tensor:
        """The gauge of a reach: at one `whole`, at zero the one in which the side itself is white.

        Args:
            side: which factor is stepped.
            reach: `(batch,)`.
        """
        reach = reach.unsqueeze(-1)
        middle = self.floored.mean(-1, keepdim=True)
        if side == "in":
            return self.inverse * ((1 - reach) * (self.floored - middle)).exp().unsqueeze(-2)
        return self.start * (reach * self.filtered + (reach - 1) * middle).exp().unsqueeze(-2)


def product_gauges(
    outgoing: Tensor,
    incoming: Tensor,
    floor: Tensor,
    kind: GaugeKind = "whitening",
    dtype: torch.dtype | None = None,
) -> ProductGauges:
    r"""The gauges of pairs, from the Gram matrices of their factors, without a graph.

    Args:
        outgoing: $X_d^\top X_d$, `(batch, k, k)`.
        incoming: $X_u^\top X_u$, `(batch, k, k)`.
        floor: $\epsilon$, `(batch,)`.
        kind: `random` for gauges of the same spectrum in other directions, `identity` for none.
        dtype: of the factors, where it is not that of their Gram matrices.

    Example:
        >>> a, b = torch.eye(2).unsqueeze(0), torch.diag(torch.tensor([16.0, 1.0])).unsqueeze(0)
        >>> gauges = product_gauges(a, b, torch.tensor([1e-3]))
        >>> full = gauges.whole("out")
        >>> (full @ full.mT)[0].round(decimals=3)
        tensor([[0.0620, 0.0000],
                [0.0000, 1.0000]])
        >>> bool(torch.allclose(gauges.reaching("out", torch.ones(1)), full))
        True
    """
    dtype, width = dtype or outgoing.dtype, outgoing.shape[-1]
    # Small matrices: in double precision an ill-conditioned split loses nothing that the gradients had not lost.
    outgoing, incoming = outgoing.double(), incoming.double()
    eye = torch.eye(width, dtype=torch.float64, device=outgoing.device)
    size = torch.diagonal(outgoing, dim1=-2, dim2=-1).sqrt()
    scale = torch.maximum(size, 1e-12 * size.amax(-1, keepdim=True)).clamp_min(1e-30)
    scaled = outgoing / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    lower, info = torch.linalg.cholesky_ex(scaled + 8 * width * torch.finfo(dtype).eps * eye)
    lower = torch.where((info == 0)[..., None, None], lower, eye) * scale.unsqueeze(-1)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT
    # Of a run that has diverged it is not finite, and the other tasks of the stack go on.
    spectrum = symmetric_spectrum(lower.mT @ incoming @ lower)
    assert spectrum.vectors is not None
    values, vectors = spectrum.values * spectrum.largest.exp().unsqueeze(-1), spectrum.vectors
    trace = values.clamp_min(0).sum(-1, keepdim=True)
    least = 8 * width * torch.finfo(dtype).eps * trace
    values = torch.where(values < least, 0.0, values)
    floors = torch.maximum(floor.double().square().unsqueeze(-1), least) + 1e-60
    tiny = torch.finfo(torch.float64).tiny ** 0.5
    filtered = ((values + tiny).sqrt() / (values + floors)).log()
    floored = (values + floors).log() / 2
    start, back = lower @ vectors, inverse @ vectors
    if kind == "identity":
        start = back = eye.expand_as(start)
        filtered, floored = torch.zeros_like(filtered), torch.zeros_like(floored)
    if kind == "random":
        turn = _turn(width).to(outgoing)
        start, back = turn @ start, turn @ back
    return ProductGauges(*(each.to(dtype) for each in (start, back, (values + tiny).sqrt(), filtered, floored)))
