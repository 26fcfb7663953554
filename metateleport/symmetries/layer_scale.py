"""Scaling of a layer, undone by the vector of gains behind it."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["LayerScale"]


class LayerScale(AxisSymmetry):
    r"""Positive scaling of the inputs of a layer scale, undone by the layer scale itself, exact.

    $$y = \gamma \odot (W h + b): \qquad (W, b) \mapsto (D W,\ D b), \quad \gamma \mapsto D^{-1} \gamma,$$

    as at the end of the branches of ConvNeXt, CaiT and DINOv2, before they join a residual stream. Where the outputs of
    $\gamma$ may scale too (a homogeneous activation and a layer behind it), that is a separate rescaling.
    """

    kind = "layer scale"
