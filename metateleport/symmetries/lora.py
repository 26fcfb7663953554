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
    def of_layers(cls, model: nn.Module, down: str, up: str) -> LoRAPair:
        """The pair of two linear layers without biases, as `find_symmetries` would find it.

        Args:
            model: holds the layers; it is read, not kept.
            down: name of the layer of $A$, `(rank, features)`.
            up: name of the layer of $B$, `(features, rank)`.

        Raises:
            Unsuitable: if the two are no linear layers without biases, or their ranks differ.

        Example:
            >>> factors = {"lora_A": nn.Linear(5, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)}
            >>> LoRAPair.of_layers(nn.ModuleDict(factors), "lora_A", "lora_B").group
            GeneralLinear(2)
        """
        modules = dict(model.named_modules())
        for name in (down, up):
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear) or layer.bias is not None:
                raise Unsuitable(f"{name!r} is no linear layer without a bias: a LoRA pair is two of them")
        rank, other = modules[down].out_features, modules[up].in_features
        if rank != other:
            raise Unsuitable(f"{down!r} gives {rank} features and {up!r} takes {other}: the rank has to be the same")
        places = torch.arange(int(rank)).unsqueeze(0)
        return cls(
            GeneralLinear(int(rank)),
            [Leg(f"{down}.weight", places), Leg(f"{up}.weight", places, 1, dual=True)],
            inputs=[Leg(up, places, -1)],
            outputs=[Leg(down, places, -1)],
        )
