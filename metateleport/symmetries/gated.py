"""Scaling of the ungated half of a gated MLP."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["GatedMLP"]


class GatedMLP(AxisSymmetry):
    r"""Positive scaling between the up and the down projection of a gated MLP, exact.

    $$y = W_{down}\,\big(s(W_{gate} h) \odot W_{up} h\big): \qquad W_{up} \mapsto D W_{up}, \quad
      W_{down} \mapsto W_{down} D^{-1},$$

    whatever the activation $s$ of the gate (SwiGLU, GEGLU, squeeze and excitation).
    """

    kind = "gated MLP"
