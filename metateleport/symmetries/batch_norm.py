"""Scalings on either side of a BatchNorm."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["AfterBatchNorm", "BeforeBatchNorm"]


class AfterBatchNorm(AxisSymmetry):
    r"""Positive scaling of a BatchNorm's gain and bias through a homogeneous activation, exact.

    $$(\gamma, \beta) \mapsto (d\gamma,\ d\beta), \qquad U \mapsto U\,\mathrm{diag}(d)^{-1}.$$

    Where branches are added (a residual stream), the gains of all of them move together.
    """

    kind = "after batch norm"


class BeforeBatchNorm(AxisSymmetry):
    r"""Positive scaling of the inputs of a BatchNorm.

    $$(V, b) \mapsto (D V,\ D b), \qquad \mu \mapsto d\mu, \quad v \mapsto d^2 (v + \epsilon) - \epsilon,$$

    with the running mean $\mu$ and variance $v$, which are buffers: exact in evaluation. In training the batch's own
    variance takes the place of $v$, and the scaling holds up to $\epsilon$ against it: approximate.
    """

    kind = "before batch norm"
