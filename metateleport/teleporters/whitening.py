"""Whitening in closed form: g = (H H^T)^-1/2 and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metateleport.groups import Group
from metateleport.linalg import symmetric_log
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters.base import Teleporter, TrustRegion
from metateleport.teleporters.simple import no_motion

__all__ = ["SIDES", "Side", "WhiteningTeleporter"]

Side = Literal["features", "outgoing", "balanced", "alternating"]
SIDES: tuple[Side, ...] = get_args(Side)

_DAMPING = {torch.float64: 1e-13, torch.float32: 1e-6}
# Two factors of a low rank can be balanced in many ways; those that stretch least are near a larger damping.
_BALANCED = 1e-6

_SIDES: dict[str, Side] = {"in": "features", "out": "outgoing", "both": "balanced"}

Matrices = dict[str, Tensor]


class WhiteningTeleporter(Teleporter):
    r"""Whitens what lies between two layers, in closed form.

    For a pair $y = U\, s(V h + b)$ with features $H = s(Vh + b)$, samples in columns, the group element is symmetric
    and positive definite:

    | side | element | what it makes the identity | a step of gradient descent then is preconditioned |
    |---|---|---|---|
    | `features` | $(H H^\top + \epsilon)^{-1/2}$ | covariance of the features | along $U$, by $(H H^\top)^{-1}$ |
    | `outgoing` | $(U^\top U + \epsilon)^{1/2}$ | $U^\top U$ | along $V$, by $(U^\top U)^{-1}$ |
    | `balanced` | $g\,V V^\top g = g^{-1} U^\top U g^{-1}$ | both factors alike, nothing white | along both, by half |
    | `alternating` | `features` and `outgoing` in turn | | |

    In the 2024 form, where the activation follows the element, the covariance is that of the pre-activations. Where no
    features were recorded (queries and keys), $V V^\top$ is used instead. A diagonal group whitens only the diagonal. A
    symmetry without these matrices does not move. Directions that the covariance does not span, as with fewer samples
    than units, keep the scale of the largest one.

    After a step relative to the curvature, `features` solves the least-squares problem of the upper layer. Stepping
    each tensor in a gauge of its own is `metateleport.gauges.step_in_gauges`.

    Args:
        side: what is made white; or a function from the symmetry to one of the first three.
        damping: $\epsilon$ over the largest eigenvalue; the default is 1e-13, and 1e-6 in float32 and for `balanced`.
        trust_region: bounds on each teleport; the default allows generators of norm 1000.

    Raises:
        ValueError: if the side is unknown, or the damping is negative or not finite.

    Example:
        >>> from metateleport import LinearPair
        >>> from metateleport.point import Point
        >>> pair = LinearPair(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)), "0", "1")
        >>> weights = {"0.weight": torch.zeros(2, 3), "1.weight": torch.zeros(1, 2)}
        >>> features = torch.tensor([[4.0, 0.0], [0.0, 0.5]])
        >>> point = Point(weights, activations={"1": features})
        >>> generator, _ = WhiteningTeleporter().generator(pair, point, None)
        >>> features @ pair.group.exp(generator)
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000]])

    Source: for the gauge of a tensor in an exact pair, Tong, Ma and Chi, JMLR 2021 (arXiv 2005.08898), equation 3.
    """

    name = "whitening"

    def __init__(
        self,
        side: Side | Callable[[Symmetry], Side] = "features",
        damping: float | None = None,
        trust_region: TrustRegion | None = None,
    ) -> None:
        super().__init__(trust_region or TrustRegion(max_size=1000.0))
        if not callable(side) and side not in SIDES:
            raise ValueError(f"a side is one of {', '.join(SIDES)}, or a function of the symmetry; not {side!r}")
        if damping is not None and not 0 <= damping < float("inf"):
            raise ValueError(f"damping is relative to the largest eigenvalue: finite, at least zero, not {damping!r}")
        self.side, self.damping = side, damping

    @classmethod
    def for_group(cls, group: Any, damping: float | None = None) -> WhiteningTeleporter:
        """The gauge of some tensors: an upper layer sees white features, a lower one a white layer above.

        Args:
            group: a `metateleport.gauges.TensorGroup`.
            damping: as above.
        """

        def side(symmetry: Symmetry) -> Side:
            return _SIDES[symmetry.side(next(name for name in group.names if name in symmetry.parameters))]

        return cls(side, damping)

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> tuple[int, int]:
        """How many generators were asked for, and how many symmetries a teleport has: what alternates needs both."""
        return 0, max(len(symmetries), 1)

    def generator(self, symmetry: Symmetry, point: Point, state: tuple[int, int] | None) -> tuple[Tensor, Any]:
        asked, count = state or (0, 1)
        side = self.side(symmetry) if callable(self.side) else self.side
        if side == "alternating":
            side = "features" if (asked // count) % 2 == 0 else "outgoing"
        chosen = self._logarithm(side, symmetry.group, symmetry.matrices(point.detach()))
        return no_motion(symmetry, point) if chosen is None else chosen, (asked + 1, count)

    def _logarithm(self, side: Side, group: Group, matrices: Matrices) -> Tensor | None:
        if side == "features":
            known = (f"{name}_covariance" for name in ("preactivation", "feature", "incoming"))
            features = next((matrices[name] for name in known if name in matrices), None)
            return None if features is None else -self._log(group, features, self.damping) / 2
        outgoing, incoming = matrices.get("outgoing_covariance"), matrices.get("incoming_covariance")
        if outgoing is None:
            return None
        if side == "outgoing":
            return self._log(group, outgoing, self.damping) / 2
        if incoming is None:
            return None
        damping = _BALANCED if self.damping is None else self.damping
        if len(group.shape) == 1:
            return (self._log(group, outgoing, damping) - self._log(group, incoming, damping)) / 4
        # g^2 P g^2 = Q is solved by the geometric mean of P^-1 and Q.
        log = self._log(group, incoming, damping)
        root, inverse_root = (torch.linalg.matrix_exp(sign * log / 2) for sign in (1, -1))
        middle = torch.linalg.matrix_exp(self._log(group, root @ outgoing @ root, damping) / 2)
        return self._log(group, inverse_root @ middle @ inverse_root, damping) / 2

    def _log(self, group: Group, covariance: Tensor, damping: float | None) -> Tensor:
        damping = _DAMPING.get(covariance.dtype, 1e-6) if damping is None else damping
        if len(group.shape) > 1:
            return symmetric_log(covariance, damping, rank=damping)[0]
        tiny = torch.finfo(covariance.dtype).tiny
        diagonal = torch.diagonal(covariance, dim1=-2, dim2=-1).clamp_min(0)
        return (diagonal + damping * diagonal.amax(-1, keepdim=True)).clamp_min(tiny).log()
