"""GL(k) between any number of linear layers with nothing between them."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["LinearChain"]


class LinearChain(AxisSymmetry):
    r"""$GL(k)$ on features that some affine layers output and others read, with nothing between them, exact.

    $$(V_i, b_i) \mapsto (g V_i, g b_i), \qquad U_j \mapsto U_j g^{-1}.$$

    Like `LinearPair`, but with several layers on either side (a linear residual stream), with convolutions (along
    their channels), or with operations between that are linear in each feature alike (average pooling, padding by
    zero, sums over positions).

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 2.
    """

    kind = "linear chain"
