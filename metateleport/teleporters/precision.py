"""Teleports in half precision: computed in float32, and the drift that rounding back may cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metateleport.detection.trace import observables
from metateleport.point import Point
from metateleport.teleporters.report import relative_change

__all__ = ["change_of", "drift_bound", "wide", "widened"]

_ROUNDINGS = 8


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least, and dense.

    Example:
        >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype, wide(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return dense.float() if dense.is_floating_point() and dense.element_size() < 4 else dense


def widened(point: Point) -> Point:
    """A point in float32 at least, with dense gradients.

    Elements, inverses and actions are computed at this point. The moved parameters are rounded to their own dtypes
    where they are written, and evaluations of the model use its own dtypes.

    Args:
        point: in any precision.

    Example:
        >>> point = Point({"weight": torch.ones(2, dtype=torch.float16)})
        >>> widened(point).parameters["weight"].dtype
        torch.float32
    """
    own = {name: value.dtype for name, value in point.parameters.items()}
    seen = {name: value.dtype for name, value in point.activations.items()}
    pullback, loss_at = point.pullback, point.loss_at

    def wide_pullback(module: str, cotangent: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert pullback is not None
        found = pullback(module, cotangent.to(seen[module]))
        first, second = ({name: wide(value) for name, value in each.items()} for each in found)
        return first, second

    def wide_loss(parameters: Mapping[str, Tensor]) -> Tensor:
        assert loss_at is not None
        return wide(loss_at({name: value.to(own[name]) for name, value in parameters.items()}))

    return dataclasses.replace(
        point.map(wide),
        pullback=None if pullback is None else wide_pullback,
        loss_at=None if loss_at is None else wide_loss,
    )


def drift_bound(max_drift: float, dtypes: Iterable[torch.dtype]) -> float:
    """How far a teleport may change the outputs: a bound, or eight roundings of the coarsest half precision.

    Args:
        max_drift: the bound of the teleporter's trust region.
        dtypes: of parameters and outputs.

    Example:
        >>> drift_bound(0.01, [torch.float32]), drift_bound(0.01, [torch.float32, torch.bfloat16])
        (0.01, 0.0625)
    """
    half = [torch.finfo(each).eps for each in dtypes if each.is_floating_point and each.itemsize < 4]
    return max(max_drift, _ROUNDINGS * max(half, default=0.0))


def change_of(before: Any, after: Any) -> float:
    """The largest relative change of a tensor among some outputs; for integers, the share that changed.

    Infinite entries (masked scores) have to stay infinite.

    Args:
        before: a tensor, or a container of tensors.
        after: the same of other weights.

    Example:
        >>> round(change_of({"scores": torch.ones(4)}, {"scores": 1.1 * torch.ones(4)}), 6)
        0.1
    """
    pairs = list(zip(observables(before), observables(after), strict=True))
    complexes = [each for each in pairs if each[0].is_complex()]
    floating = [each for each in pairs if each[0].is_floating_point()]
    floating += [(torch.view_as_real(old), torch.view_as_real(new)) for old, new in complexes]
    if not floating:
        return max(float((old != new).double().mean()) if old.numel() else 0.0 for old, new in pairs)
    worst = 0.0
    for old, new in floating:
        infinite = old.isinf()
        if not torch.equal(old[infinite], new[infinite]):
            return float("inf")
        worst = max(worst, relative_change(old[~infinite], new[~infinite]))
    return worst
