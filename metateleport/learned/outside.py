"""What steps in gauges see of the rows of factors: sketches of their second moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from metateleport.gauges.factors import FactorPair, FactorSide
from metateleport.gauges.outer import OuterGauge, outer_gauge, sketch_width, sketched
from metateleport.gauges.spectrum import ProductGauges
from metateleport.point import Tensors

__all__ = ["Outside", "exchanged", "seen_outside"]

_MEMORY = 0.95


@dataclasses.dataclass(frozen=True)
class Outside:
    r"""What is seen of the rows of one side of pairs of one rank.

    Args:
        sketches: $S$ of each stack of pairs of one shape, `(pairs * tasks, n, q)`.
        inside: of all pairs one after the other, $S^\top$ times gradient, momentum and slow momentum side by side,
            `(pairs * tasks, q, 3 k)`; sketches of fewer columns have zeros in the last rows.
        gauge: of all pairs.
    """

    sketches: tuple[Tensor, ...]
    inside: Tensor
    gauge: OuterGauge

    def combined(self, factors: Tensor) -> Tensor:
        r"""$S^\top$ times a combination of gradient, momentum and slow momentum, `(pairs * tasks, q, k)`.

        Args:
            factors: of the three, `(pairs * tasks, 3)`.
        """
        parts = self.inside.unflatten(-1, (3, -1))
        return (parts * factors[:, None, :, None]).sum(2)


def seen_outside(
    pairs: Sequence[FactorPair],
    stacks: Sequence[Sequence[int]],
    side: FactorSide,
    trios: Sequence[Tensor],
    gauges: ProductGauges,
    taken: Tensor,
    kept: Tensors,
) -> Outside:
    """Brings the sketches of one side up to date and looks at the rows through them.

    Args:
        pairs: of the model.
        stacks: numbers of the pairs of one shape each.
        side: which.
        trios: gradient, momentum and slow momentum of each stack in a row, `(pairs * tasks, n, 3 k)`.
        gauges: of all these pairs, one after the other.
        taken: whether a task's step is taken, `(tasks,)`.
        kept: the sketches by the name of each side's first tensor, `(tasks, heads, n, q)`; changed in place.
    """
    whole, sketches, start = gauges.whole(side), [], 0
    for trio, stack in zip(trios, stacks, strict=True):
        part = slice(start, start + len(trio))
        start += len(trio)
        width = trio.shape[-1] // 3
        gradient = trio[..., :width].detach()
        memory = (1 - (1 - _MEMORY) * taken.to(gradient)).repeat(len(stack))
        places, olds = [], []
        for each in stack:
            name = pairs[each].names(side)[0]
            heads = [number for number, pair in enumerate(pairs) if pair.names(side)[0] == name]
            if kept[name].ndim < 4:
                columns = sketch_width(width, trio.shape[1])
                kept[name] = gradient.new_zeros(len(taken), len(heads), trio.shape[1], columns)
            places.append((name, heads.index(each)))
            olds.append(kept[name][:, places[-1][1]].to(gradient))
        sketch = sketched(torch.cat(olds), gradient @ whole[part], memory)
        for (name, place), own in zip(places, sketch.split(len(taken)), strict=True):
            kept[name] = exchanged(kept[name], place, own)
        sketches.append(sketch)
    columns = max(sketch.shape[-1] for sketch in sketches)
    inside = torch.cat([_filled(sketch.mT @ trio, columns, -2) for sketch, trio in zip(sketches, trios, strict=True)])
    several = [outer_gauge(sketch) for sketch in sketches]
    values = torch.cat([_filled(each.values, columns, -1) for each in several])
    return Outside(tuple(sketches), inside, OuterGauge(values, torch.cat([each.floor for each in several])))


def _filled(tensor: Tensor, size: int, dim: int) -> Tensor:
    """A tensor with zeros at the end of a dimension."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


def exchanged(whole: Tensor, place: int, part: Tensor) -> Tensor:
    """What is remembered of all heads of a tensor, with one head's exchanged."""
    if whole.shape[1] == 1:
        return part.unsqueeze(1)
    return torch.cat((whole[:, :place].to(part), part.unsqueeze(1), whole[:, place + 1 :].to(part)), 1)
