"""Two linear layers with an activation between them, taken as if it were linear: for gauges, which are undone."""

from __future__ import annotations

from torch import Tensor, nn

from metateleport.groups import GeneralLinear
from metateleport.point import Point
from metateleport.symmetries.base import Pair, Unsuitable
from metateleport.symmetries.linear_pair import LinearPair

__all__ = ["LinearisedPair"]


class LinearisedPair(LinearPair):
    r"""$GL(k)$ acting on both layers of a pair as if nothing stood between them; not invariant, and meant for gauges.

    $$(U, V, b) \mapsto (U g^{-1},\ g V,\ g b)$$

    A gauge is undone after the step, so its action has to be linear in the weights and need not leave the outputs
    unchanged. That holds on every batch, also with more samples than units, where batch pairs do not exist. As a
    teleport that stays it would change the outputs; `exactness` says so, and teleporters are never given it.

    Args:
        pair: the pair of linear layers, along which a smaller group or a batch pair is exact.

    Raises:
        Unsuitable: if one of its layers is not linear.

    Example:
        >>> from metateleport.symmetries import Rescaling
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
        >>> LinearisedPair(Rescaling(model, "0", "2")).dimension
        25
    """

    kind = "linearised pair"
    exactness = "approximate"

    def __init__(self, pair: Pair) -> None:
        if not pair.is_dense:
            raise Unsuitable(f"{pair!r} has a convolution; only a pair of linear layers is taken as linear")
        # The pair has checked the model; its names and sizes are all that is needed.
        for name, value in vars(pair).items():
            if name not in ("group", "certificate"):
                setattr(self, name, value)
        self.group: GeneralLinear = GeneralLinear(pair.width)
        self.activation: nn.Module | None = getattr(pair, "activation", None)

    def slopes(self, point: Point) -> Tensor | None:
        return Pair.slopes(self, point)
