"""Rescaling of units between any number of layers."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["ChannelRescaling"]


class ChannelRescaling(AxisSymmetry):
    r"""Positive diagonal scaling of units or channels, between all layers that output and read them, exact.

    $$(V_i, b_i) \mapsto (D V_i, D b_i), \qquad U_j \mapsto U_j D^{-1}.$$

    Like `Rescaling`, but with several layers on either side: the branches of a residual stream, skips that are
    concatenated, grouped convolutions (each row of $U_j$ is divided by the scalings of the channels of its group) and
    depthwise ones (channel $c$ of the kernel goes to $d'_c k_c / d_c$, where $d$ stands before it and $d'$ behind).
    All that stands between has to be positively homogeneous: ReLU, LeakyReLU, PReLU, pooling, dropout, flattening.

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), section 4.
    """

    kind = "rescaling"
