"""Scaling of a norm's gain, undone by the layers that read it."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["NormGain"]


class NormGain(AxisSymmetry):
    r"""Positive scaling of the gain and bias of a LayerNorm, RMSNorm, GroupNorm or InstanceNorm, exact.

    $$(\gamma, \beta) \mapsto (d\gamma,\ d\beta), \qquad W_j \mapsto W_j\,\mathrm{diag}(d)^{-1}$$

    for all layers $W_j$ that read the norm's outputs (query, key and value; gate and up). A gain whose result
    goes into a residual stream cannot move.
    """

    kind = "norm gain"
