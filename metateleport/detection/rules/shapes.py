"""Operations that rearrange entries: reshaping, concatenation, indexing, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metateleport.detection.rules.registry import RULES, constant, homogeneous, rule, same
from metateleport.detection.values import Context, Value


def _pool(name: str, dims: int, largest: bool) -> None:
    def pooled(context: Context, shape: tuple[int, ...], x: Value, *_: Any, **__: Any) -> Value:
        x = constant(context, x, range(x.ndim - dims, x.ndim))
        return (homogeneous if largest else same)(context, shape, x)

    RULES[name] = pooled


for _dims in (1, 2, 3):
    for _name in (f"avg_pool{_dims}d", f"adaptive_avg_pool{_dims}d", f"upsample_nearest{_dims}d"):
        _pool(_name, _dims, False)
    _pool(f"max_pool{_dims}d", _dims, True)
for _name, _dims in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3)):
    _pool(f"upsample_{_name}", _dims, False)


@rule("mean", "sum", "amax", "amin")
def _reduce(
    context: Context, shape: tuple[int, ...], x: Value, dims: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % x.ndim for dim in dims]
    x = constant(context, x, dims)
    labels = list(x.labels)
    if not keepdim:
        kept = [dim for dim in range(x.ndim) if dim not in dims]
        labels = [label.permute(*kept, *dims).reshape([label.shape[dim] for dim in kept]) for label in labels]
    result = context.value(shape, labels)
    return result if context.name in ("mean", "sum") else homogeneous(context, shape, result)


@rule("constant_pad_nd", "pad")
def _pad(context: Context, shape: tuple[int, ...], x: Value, pads: Sequence[int], *rest: Any) -> Value | None:
    if any(each not in (0, "constant", None) for each in rest):
        return None
    padded = [x.ndim - 1 - i for i in range(len(pads) // 2) if pads[2 * i] or pads[2 * i + 1]]
    return context.value(shape, constant(context, x, padded).labels)


_RESHAPING = ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"]
_EXPANDING = ["expand", "expand_as"]
_MOVING = (
    "permute",
    "transpose",
    "t",
    "squeeze",
    "unsqueeze",
    "select",
    "slice",
    "narrow",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "movedim",
    "repeat",
    "repeat_interleave",
    "flip",
    "roll",
    "unfold",
    "pixel_shuffle",
    "channel_shuffle",
    "numpy_T",
    "mT",
    "swapaxes",
    "swapdims",
)


def _reshape(context: Context, shape: tuple[int, ...], x: Value, *arguments: Any, **__: Any) -> Value | None:
    if any(isinstance(each, torch.dtype) for each in arguments):
        return None
    return context.value(shape, [label.expand(x.shape).reshape(shape) for label in x.labels])


def _expand(context: Context, shape: tuple[int, ...], x: Value, *_: Any, **__: Any) -> Value:
    return context.value(shape, x.labels)


def _moved(context: Context, shape: Any, x: Value, *arguments: Any, **keywords: Any) -> Any:
    assert context.function is not None
    results = [context.function(label.expand(x.shape), *arguments, **keywords) for label in x.labels]
    if isinstance(shape, list):
        return [context.value(each, [result[i] for result in results]) for i, each in enumerate(shape)]
    return context.value(shape, results)


RULES.update(
    dict.fromkeys(_RESHAPING, _reshape), **dict.fromkeys(_EXPANDING, _expand), **dict.fromkeys(_MOVING, _moved)
)


@rule("cat", "stack")
def _cat(context: Context, shape: tuple[int, ...], values: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(shape)
    stacked = context.name == "stack"
    # Of old, torch lets an empty vector be joined to anything.
    values = [value for value in values if stacked or value.ndim == len(shape)]
    result = []
    for place in range(max(len(value.labels) for value in values)):
        parts = []
        for value in values:
            label = (
                value.labels[place] if place < len(value.labels) else torch.zeros((1,) * value.ndim, dtype=torch.int64)
            )
            parts.append((label.unsqueeze(dim) if stacked else label, 1 if stacked else value.shape[dim]))
        common = torch.broadcast_shapes(*([n if i != dim else 1 for i, n in enumerate(p.shape)] for p, _ in parts))
        wide = [part.expand([size if i == dim else n for i, n in enumerate(common)]) for part, size in parts]
        result.append(torch.cat(wide, dim))
    return context.value(shape, result)
