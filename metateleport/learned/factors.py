"""What steps in gauges are made of: Gram matrices of factors and gradients, and features that no split changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.gauges.factors import FactorPair, FactorSide, spread
from metateleport.gauges.outer import OuterGauge
from metateleport.gauges.spectrum import ProductGauges
from metateleport.gauges.whitened import SIDES, rows_of
from metateleport.learned.progress import Progress
from metateleport.linalg import fit
from metateleport.point import Point, Tensors

__all__ = [
    "FACTOR_FEATURES",
    "combined",
    "factor_features",
    "gram_of",
    "has_gauges",
    "row_count",
    "spread_steps",
    "trio_of",
    "unit_of",
]

FACTOR_FEATURES = 13

MATCHED = 0.2
"""Root mean square of the entries of a polar step over its length, as in `metateleport.GaugedOptimizer`."""

LENGTH = 0.06
"""Where the length of the steps starts."""

_RANK = 4
"""The rank at which it is that."""


def gram_of(
    pairs: Sequence[FactorPair], numbers: Sequence[int], side: FactorSide, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Gram matrices of one side of pairs of one shape, `(pairs * tasks, k, k)`."""
    rows = torch.cat([_known(rows_of(pairs[each], side, tensors)) for each in numbers]).double()
    return rows.mT @ rows


def trio_of(
    pairs: Sequence[FactorPair],
    numbers: Sequence[int],
    side: FactorSide,
    gradients: Mapping[str, Tensor],
    momentum: Mapping[str, Tensor],
    slow: Mapping[str, Tensor],
) -> Tensor | None:
    """Gradient, momentum and slow momentum of one side in a row, `(pairs * tasks, n, 3 k)`; None without gradients."""
    if not all(name in gradients for each in numbers for name in pairs[each].names(side)):
        return None
    parts = [
        torch.cat([_known(rows_of(pairs[each], side, tensors)) for each in numbers])
        for tensors in (gradients, momentum, slow)
    ]
    return torch.cat(parts, -1)


def combined(factors: Tensor, blocks: Tensor) -> Tensor:
    """The Gram matrix of a combination of gradient, momentum and slow momentum, `(batch, k, k)`."""
    weights = factors.unsqueeze(-1) * factors.unsqueeze(-2)
    return (weights[..., None, None] * blocks).sum((1, 2))


def factor_features(
    side: FactorSide,
    blocks: Tensor,
    gauges: ProductGauges,
    outer: OuterGauge,
    level: Tensor,
    unit: Tensor,
    loss: Tensor,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """The network's features, `(pairs * tasks, features)`, and how much of the gradients the momentum is."""
    gauge, width = gauges.whole(side), blocks.shape[-1]
    seen = (
        gauge.mT.unsqueeze(1) @ torch.stack((blocks[:, 0, 0], blocks[:, 1, 1], blocks[:, 0, 1]), 1) @ gauge.unsqueeze(1)
    )
    power, velocity, product = torch.diagonal(seen, dim1=-2, dim2=-1).sum(-1).unbind(-1)
    tiny = torch.finfo(power.dtype).tiny
    steady = ((velocity + tiny) / (level + tiny)).sqrt().clamp(1e-4, 1.0)
    flat = velocity.square() / (seen[:, 1].square().sum((1, 2)) + tiny) / width
    steep = (velocity * width).sqrt() * unit / loss.abs().clamp_min(tiny).repeat(len(unit) // len(loss))
    largest = gauges.values.amax(-1).clamp_min(tiny)
    ones = torch.ones_like(power)
    features = (
        product / ((power + tiny) * (velocity + tiny)).sqrt(),
        steady.log() / 3,
        ((power + tiny) / (level + tiny)).log() / 4,
        flat,
        steep.clamp(1e-8, 1e8).log() / 5 if progress.known else 0 * ones,
        (largest / unit).clamp(1e-8, 1e8).log() / 5,
        (gauges.values / largest.unsqueeze(-1)).square().mean(-1),
        (outer.values.sum(-1) / outer.values.amax(-1).clamp_min(tiny)).clamp_min(1.0).log() / 3,
        ones * (math.log(width) / 3),
        (unit / (LENGTH * MATCHED)).log() / 3,
        ones * (math.log(progress.time + 1) / 5),
        ones * progress.left,
        ones * (0.0 if progress.total is None else math.log(progress.total + 1) / 5),
    )
    return torch.stack(features, -1), steady


def spread_steps(
    pairs: Sequence[FactorPair],
    numbers: Sequence[int],
    side: FactorSide,
    trio: Tensor,
    step: Tensor,
    shares: Tensor,
    point: Point,
    slow: Tensors,
    after: dict[str, Any],
    moved: Tensors,
) -> None:
    """Writes the steps and the new momenta of one side of pairs of one shape to their tensors."""
    width, tasks = step.shape[-1], len(trio) // len(numbers)
    gradient, before, behind = trio.split(width, -1)
    momentum = torch.lerp(before, gradient, fit(shares[:, 0], before))
    late = torch.lerp(behind, gradient, fit(shares[:, 1], behind))
    for row, each in enumerate(numbers):
        part, start = slice(row * tasks, (row + 1) * tasks), 0
        for leg in pairs[each].legs(side):
            like = point.gradients[leg.name]
            count = like[0].numel() // like.shape[leg.axis + 1] * leg.places.shape[0]
            place = slice(start, start + count)
            start += count
            moved[leg.name] = moved[leg.name] - spread(leg, step[part, place], torch.zeros_like(like))
            after["momentum"][leg.name] = spread(leg, momentum[part, place], after["momentum"][leg.name])
            old = after["slow"][leg.name]
            after["slow"][leg.name] = spread(leg, late[part, place], old if old.shape == like.shape else slow[leg.name])


def _known(rows: Tensor | None) -> Tensor:
    assert rows is not None
    return rows


def unit_of(pair: FactorPair, parameters: Mapping[str, Tensor]) -> float:
    """The length that steps of a pair start with: its product moves as far at every rank, in the Frobenius norm."""
    rows = max(row_count(pair, side, parameters) for side in SIDES)
    return LENGTH * MATCHED * math.sqrt(rows * _RANK / pair.size)


def has_gauges(pair: FactorPair, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the factor that puts features out can have full rank, which the gauges of a pair are made from.

    Args:
        pair: of the model.
        parameters: with the task dimension in front.

    Example:
        >>> from torch import nn
        >>> from metateleport import LinearPair
        >>> from metateleport.gauges import factor_pairs
        >>> def wide(size: int) -> bool:
        ...     model = nn.Sequential(nn.Linear(3, size, bias=False), nn.Linear(size, 2))
        ...     weights = {name: value.unsqueeze(0) for name, value in model.named_parameters()}
        ...     return has_gauges(factor_pairs([LinearPair(model, "0", "1")])[0], weights)
        >>> wide(3), wide(4)
        (True, False)
    """
    return row_count(pair, "out", parameters) >= pair.size


def row_count(pair: FactorPair, side: FactorSide, parameters: Mapping[str, Tensor]) -> int:
    """How many rows the matrix of one side has."""
    return sum(
        parameters[leg.name][0].numel() // parameters[leg.name].shape[leg.axis + 1] * leg.places.shape[0]
        for leg in pair.legs(side)
    )
