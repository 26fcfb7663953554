"""Scaling on either side of a vector of gains."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["LayerScale"]


class LayerScale(AxisSymmetry):
    r"""Positive scaling of what a layer scale takes in, undone by the layer scale itself, exact.

    $$y = \gamma \odot (W h + b): \qquad (W, b) \mapsto (D W,\ D b), \quad \gamma \mapsto D^{-1} \gamma,$$

    as at the end of the branches of ConvNeXt, CaiT and DINOv2, before they join a residual stream. Where what
    $\gamma$ puts out may scale too (a homogeneous activation and a layer behind), that is a rescaling of its own.
    """

    kind = "layer scale"
