"""The two factors of a low-rank adapter."""

from __future__ import annotations

import torch
from torch import nn

from metateleport.groups import GeneralLinear
from metateleport.symmetries.axes import AxisSymmetry, Leg
from metateleport.symmetries.base import Unsuitable

__all__ = ["LoRAPair"]


class LoRAPair(AxisSymmetry):
    r"""$GL(r)$ between the factors of a low-rank adapter $W + \alpha B A$ of rank $r$, exact.

    $$A \mapsto g A, \qquad B \mapsto B g^{-1}.$$

    The base weight $W$ may be frozen. At the start of training $B$ is zero, so that any action on it looks right: the
    certificate is measured at random factors too.
    """

    kind = "LoRA pair"

    @classmethod
    def of(cls, model: nn.Module, first: str, second: str) -> LoRAPair:
        """The symmetry of an adapter whose two factors are named.

        Args:
            model: the module that holds them; it is read, not kept.
            first: name of the parameter $A$, `(r, inputs)`, or `(r, inputs, ...)` of a convolution.
            second: name of the parameter $B$, `(outputs, r)`, or `(outputs, r, ...)`.

        Raises:
            Unsuitable: if a name is unknown, or the ranks differ.

        Example:
            >>> model = nn.ParameterDict({"a": nn.Parameter(torch.ones(2, 5)), "b": nn.Parameter(torch.zeros(3, 2))})
            >>> LoRAPair.of(model, "a", "b")
            LoRAPair(a[0:2], b; GeneralLinear(2), exact)
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        for name in (first, second):
            if name not in named:
                raise Unsuitable(f"{cls.kind}: the model has no parameter {name!r}")
        shapes = tuple(named[first].shape), tuple(named[second].shape)
        if min(map(len, shapes)) < 2 or shapes[0][0] != shapes[1][1] or not shapes[0][0]:
            raise Unsuitable(
                f"{cls.kind}: {first!r} of shape {shapes[0]} and {second!r} of shape {shapes[1]} are no factors A and "
                "B of one rank, (r, inputs) and (outputs, r)"
            )
        whole = torch.arange(shapes[0][0]).reshape(1, -1)
        return cls(GeneralLinear(shapes[0][0]), [Leg(first, whole, 0), Leg(second, whole, 1, dual=True)])
