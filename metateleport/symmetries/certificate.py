"""The certificate of a symmetry: the drift that was measured under random elements."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["Certificate"]


@dataclasses.dataclass(frozen=True)
class Certificate:
    r"""How far outputs moved under random elements of a symmetry.

    The drift is $\max \|f_{g w}(x) - f_w(x)\| / \|f_w(x)\|$ over the outputs $f$, weights $w$, inputs $x$ and elements
    $g$ that were tried. An exact symmetry holds if the drift is at most $10^{-10}$ in float64 and $10^{-4}$ in float32
    (ten times that for elements of norm three, because rounding grows with the condition number). The bound is
    $10^{-2}$ for an approximate one; for a batch pair, which solves a linear system, $10^{-6}$ in float64 and
    $10^{-2}$ in float32.

    Args:
        drift: the largest relative change of the outputs, in the Frobenius norm, on inputs not used for finding; of a
            batch pair on its batch.
        drift_given: the same on the example input.
        sizes: Frobenius norms of the generators drawn.
        weights: at how many sets of weights: the model's own, and random ones.
        dtype: what it was measured in.
        together: with how many symmetries at once it was moved.
        reason: why the symmetry was refused; empty where it holds.

    Example:
        >>> refused = Certificate(0.3, 0.3, (1.0,), 1, torch.float64, reason="outputs drift by 3.0e-01")
        >>> refused.holds
        False
    """

    drift: float
    drift_given: float
    sizes: tuple[float, ...]
    weights: int
    dtype: torch.dtype
    together: int = 1
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the symmetry passed."""
        return not self.reason
