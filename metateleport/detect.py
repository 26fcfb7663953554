"""Naming the symmetries of a model that is a plain chain of layers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import nn

from metateleport.symmetries import HOMOGENEOUS, LinearPair, Rescaling, Symmetry, Unsuitable

__all__ = ["symmetries_of"]

_PASSED_THROUGH = (nn.Dropout, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def symmetries_of(model: nn.Module) -> Sequence[Symmetry]:
    """The exact symmetries of a chain of layers: linear pairs, and rescaling through homogeneous activations.

    Understands `nn.Sequential`, nested ones included. The symmetries of any other module have to be named by hand.

    Args:
        model: the model.

    Returns:
        Symmetries in the order of the data flow.

    Raises:
        Unsuitable: if the model is not such a chain, or has no symmetry of these kinds.

    Example:
        >>> symmetries_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 1)))
        [Rescaling(0.weight, 0.bias, 2.weight; PositiveDiagonal(4), exact), \
LinearPair(2.weight, 2.bias, 3.weight; GeneralLinear(2), exact)]
    """
    if not isinstance(model, nn.Sequential):
        raise Unsuitable(
            f"symmetries are found by themselves only in nn.Sequential, and this is a {type(model).__name__}: "
            "name them with symmetries=[metateleport.Rescaling(model, first, second), ...]"
        )
    found: list[Symmetry] = []
    last: str | None = None
    homogeneous, linear = True, True
    for name, module in _chain(model, ""):
        if isinstance(module, _LAYERS):
            if last is not None and homogeneous:
                both_linear = all(isinstance(dict(model.named_modules())[each], nn.Linear) for each in (last, name))
                kind = LinearPair if linear and both_linear else Rescaling
                with contextlib.suppress(Unsuitable):
                    found.append(kind(model, last, name))
            last, homogeneous, linear = name, True, True
        elif isinstance(module, HOMOGENEOUS):
            linear = linear and isinstance(module, nn.Identity)
        elif isinstance(module, _PASSED_THROUGH):
            linear = False
        else:
            homogeneous = False
    if not found:
        raise Unsuitable("this chain has no two layers with nothing or a homogeneous activation between them")
    return found


def _chain(module: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    chain: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            chain.extend(_chain(child, f"{prefix}{name}."))
        else:
            chain.append((f"{prefix}{name}", child))
    return chain
