"""The two factors of a low-rank adapter."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["LoRAPair"]


class LoRAPair(AxisSymmetry):
    r"""$GL(r)$ between the factors of a low-rank adapter $W + \alpha B A$ of rank $r$, exact.

    $$A \mapsto g A, \qquad B \mapsto B g^{-1}.$$

    The base weight $W$ may be frozen. At the start of training $B$ is zero, so that any action on it looks right: the
    certificate is measured at random factors too.
    """

    kind = "LoRA pair"
