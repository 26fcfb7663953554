"""Low-rank adapters on frozen layers, and starts at which their product is split otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metateleport.groups import GeneralLinear
from metateleport.symmetries.axes import Leg
from metateleport.symmetries.lora import LoRAPair

__all__ = ["Adapter", "adapted", "pairs_of", "splitting"]


class Adapter(nn.Module):
    r"""A frozen linear layer with a low-rank adapter, $y = W x + b + B A x$; the parameters have PEFT's names.

    The adapter starts as usual: $A$ as torch starts a linear layer (Kaiming), $B$ at zero.

    Args:
        layer: the layer of $W$ and $b$; its parameters are frozen.
        rank: of the adapter.
        source: draws $A$.
        split: the element of $GL(r)$ that $A$ and $B$ are split by, `(rank, rank)`: $A \mapsto g A$.

    Example:
        >>> source = torch.Generator().manual_seed(0)
        >>> adapter = Adapter(nn.Linear(6, 3), rank=2, source=source)
        >>> [name for name, value in adapter.named_parameters() if value.requires_grad]
        ['lora_A.weight', 'lora_B.weight']

    Source: Hu et al., ICLR 2022 (arXiv 2106.09685).
    """

    def __init__(self, layer: nn.Linear, rank: int, source: torch.Generator, split: Tensor | None = None) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=False)
        bound = layer.in_features**-0.5
        with torch.no_grad():
            self.lora_A.weight.uniform_(-bound, bound, generator=source)
            self.lora_B.weight.zero_()
            if split is not None:
                self.lora_A.weight.copy_(split @ self.lora_A.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + self.lora_B(self.lora_A(inputs))


def adapted(
    model: nn.Module,
    rank: int,
    source: torch.Generator,
    scale: float = 1.0,
    condition: float = 1.0,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """Puts adapters on linear layers of a model, in place, and freezes all else.

    Args:
        model: the model.
        rank: of the adapters.
        source: draws their starts.
        scale: size of the element of GL(r) that each is split by.
        condition: its condition number.
        targets: last parts of the names of the layers; all if not given.

    Example:
        >>> model = adapted(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 2, torch.Generator().manual_seed(0))
        >>> [(pair.kind, pair.where) for pair in pairs_of(model)]
        [('LoRA pair', '0.lora_A.weight[0:2], 0.lora_B.weight')]
    """
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and (targets is None or name.rpartition(".")[2] in targets):
            # The start of A does not depend on how it is split.
            apart = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=source)))
            element = None if scale == condition == 1 else splitting(rank, apart, scale, condition)
            holder, _, own = name.rpartition(".")
            setattr(model.get_submodule(holder), own, Adapter(layer, rank, source, element))
    return model


def splitting(rank: int, source: torch.Generator, scale: float, condition: float) -> Tensor:
    r"""A random element of $GL(r)$ of a size and a condition number: $c\, Q D P$, with $Q$ and $P$ orthogonal.

    Args:
        rank: $r$.
        source: draws $Q$ and $P$.
        scale: $c$, the geometric mean of the singular values.
        condition: ratio of the largest to the smallest singular value, which are log-spaced.

    Returns:
        The element, `(rank, rank)`, in torch's default dtype.

    Example:
        >>> element = splitting(3, torch.Generator().manual_seed(0), scale=2.0, condition=100.0)
        >>> [round(float(value), 3) for value in torch.linalg.svdvals(element)]
        [20.0, 2.0, 0.2]
    """
    left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=source))[0] for _ in range(2))
    spread = torch.linspace(0.5, -0.5, rank) if rank > 1 else torch.zeros(1)
    return scale * (left * condition**spread) @ right


def pairs_of(model: nn.Module) -> list[LoRAPair]:
    """The symmetry of every adapter of a model, in the order of its modules, as `find_symmetries` finds it."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            down, up, rank = f"{name}.lora_A", f"{name}.lora_B", module.lora_A.out_features
            places = torch.arange(rank).unsqueeze(0)
            legs = [Leg(f"{down}.weight", places), Leg(f"{up}.weight", places, 1, dual=True)]
            inputs, outputs = [Leg(up, places, -1)], [Leg(down, places, -1)]
            found.append(LoRAPair(GeneralLinear(rank), legs, inputs, outputs))
    return found
