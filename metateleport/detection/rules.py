"""How the scalings of tensors pass each operation; what has no rule here passes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.detection.values import Context, Value, varying

__all__ = ["FRESH", "RULES", "Rule"]

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}
"""By the operation's name: gets the context, the shape of the result and the arguments, gives the result's value."""

_LETTERS = "abcdefghijklmnopqrstuvw"


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


# Layers.


def _add_bias(context: Context, labels: Sequence[Tensor], shape: tuple[int, ...], bias: Value | None, dim: int) -> Value:
    result = context.value(shape, labels)
    if bias is None:
        return result
    ndim = len(shape)
    moved = [label.reshape([label.numel() if i == dim % ndim else 1 for i in range(ndim)]) for label in bias.labels]
    return context.value(shape, context.equal([result, context.value(shape, moved)]))


@_rule("linear")
def _linear(context: Context, shape: tuple[int, ...], x: Value, weight: Value, bias: Value | None = None) -> Value:
    batch = _LETTERS[: x.ndim - 1]
    labels = context.contract(x, f"{batch}z", weight, "yz" if weight.ndim == 2 else "z", f"{batch}y"[: len(shape)])
    result = _add_bias(context, labels, shape, bias, -1)
    context.affine(weight, bias, 0)
    context.watch(weight, x, result, -1)
    return result


@_rule("addmm")
def _addmm(
    context: Context, shape: tuple[int, ...], bias: Value, x: Value, weight: Value, beta: float = 1, alpha: float = 1
) -> Value:
    labels = context.contract(x, "az", weight, "zy", "ay")
    context.affine(weight, bias, 1)
    return context.value(shape, context.equal([context.value(shape, labels), bias]))


@_rule("matmul", "mm", "bmm")
def _matmul(context: Context, shape: tuple[int, ...], left: Value, right: Value) -> Value:
    batch = _LETTERS[: max(left.ndim, right.ndim) - 2] if max(left.ndim, right.ndim) > 2 else ""
    left_names = (batch[len(batch) - (left.ndim - 2) :] if left.ndim > 2 else "") + ("x" if left.ndim > 1 else "") + "z"
    right_names = (batch[len(batch) - (right.ndim - 2) :] if right.ndim > 2 else "") + (
        "zy" if right.ndim > 1 else "z"
    )
    out = batch + ("x" if left.ndim > 1 else "") + ("y" if right.ndim > 1 else "")
    both = left.parameter is None and right.parameter is None
    labels = context.contract(left, left_names, right, right_names, out, tag="attention" if both else "")
    return context.value(shape, labels)


@_rule("baddbmm")
def _baddbmm(
    context: Context, shape: tuple[int, ...], added: Value, left: Value, right: Value, **_: float
) -> Value:
    product = _matmul(context, shape, left, right)
    return context.value(shape, context.equal([product, added]))


@_rule("einsum")
def _einsum(context: Context, shape: tuple[int, ...], equation: str, values: Sequence[Value], **_: Any) -> Value | None:
    equation = equation.replace(" ", "")
    if len(values) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    names = inputs.split(",")
    if any(len(set(each)) < len(each) for each in (*names, out)):
        return None
    both = all(value.parameter is None for value in values)
    labels = context.contract(values[0], names[0], values[1], names[1], out, tag="attention" if both else "")
    return context.value(shape, labels)


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *rest: Any,
) -> Value | None:
    groups = int(rest[-1]) if rest else 1
    transposed = len(rest) == 3 and bool(rest[0])
    if transposed or x.ndim != weight.ndim:
        return None
    return _convolve(context, shape, x, weight, bias, groups, (0, 1))


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution_transpose(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value | None:
    if groups != 1 or x.ndim != weight.ndim:
        return None
    return _convolve(context, shape, x, weight, bias, 1, (1, 0))


def _convolve(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value,
    bias: Value | None,
    groups: int,
    order: tuple[int, int],
) -> Value:
    ndim = x.ndim
    x = _constant(context, x, range(2, ndim))
    weight = _without(weight, context, range(2, ndim))
    if groups == 1:
        names = "yz" if order == (0, 1) else "zy"
        flat = context.value(x.shape[:2], [label.reshape(label.shape[:2]) for label in x.labels])
        kernel = Value(
            weight.shape[:2], tuple(label.reshape(label.shape[:2]) for label in weight.labels), weight.parameter
        )
        found = context.contract(flat, "az", kernel, names, "ay")
    else:
        found = _grouped(context, x, weight, groups)
    labels = [label.reshape(*label.shape, *(1,) * (ndim - 2)) for label in found]
    result = _add_bias(context, labels, shape, bias, 1)
    if groups == 1:
        context.affine(weight, bias, order[0])
    context.watch(weight, x, result, 1)
    return result


def _grouped(context: Context, x: Value, weight: Value, groups: int) -> list[Tensor]:
    """Each row of a grouped convolution sees the channels of its group: a slot for each pair of row and channel."""
    ledger, name = context.ledger, weight.parameter
    rows, channels = weight.shape[:2]
    if name is None:
        context.kill([x, weight], "a grouped convolution whose weight is not a plain parameter")
        return []
    own = (name, 0)
    grouped = (name, "grouped")
    context.kill_labels([slot.variables for key, slot in ledger.slots.items() if _is_other(key, own, grouped)], silent=True)
    result = [ledger.alive(ledger.slots[own].variables).reshape(1, -1)] if own in ledger.slots else []
    if x.labels and (varying(x.labels[0]) and varying(x.labels[0]) != (1,)):
        context.kill(x)
    if not x.labels or (grouped not in ledger.slots and not bool(x.labels[0].any())):
        if grouped in ledger.slots:
            context.kill_labels([ledger.slots[grouped].variables], silent=True)
        return result
    slot = ledger.slot(grouped, name, (rows, channels, *(1,) * (weight.ndim - 2))).reshape(rows, channels)
    context.kill_labels(x.labels[1:], tentative=True)
    label = x.labels[0].reshape(-1, x.labels[0].shape[1])[0].expand(x.shape[1])
    seen = torch.arange(groups).repeat_interleave(rows // groups).unsqueeze(1) * channels + torch.arange(channels)
    ledger.equal(label[seen], slot, -1, len(x.labels) > 1)
    ledger.touch(context.operation, label[seen], (0,))
    return result


def _is_other(key: tuple[object, ...], own: tuple[object, ...], grouped: tuple[object, ...]) -> bool:
    return key[0] == own[0] and key not in (own, grouped)


def _without(value: Value, context: Context, dims: Sequence[int]) -> Value:
    """The value without the labels that vary along some dimensions; those have to stay."""
    bad = [label for label in value.labels if set(varying(label)) & set(dims)]
    context.kill_labels(bad, silent=True)
    kept = tuple(label for label in value.labels if not set(varying(label)) & set(dims))
    return Value(value.shape, kept, value.parameter, value.buffer)


def _constant(context: Context, value: Value, dims: Sequence[int]) -> Value:
    """The value, all of whose entries along some dimensions have to scale alike."""
    labels = []
    for label in value.labels:
        first = label
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        if first.shape != label.shape:
            context.ledger.equal(label, first, tentative=len(value.labels) > 1)
        labels.append(first)
    return Value(value.shape, tuple(labels), value.parameter, value.buffer)


@_rule("embedding")
def _embedding(context: Context, shape: tuple[int, ...], weight: Value, indices: Value, *_: Any) -> Value:
    weight = _without(weight, context, (0,))
    context.kill(indices)
    return context.value(shape, [label.reshape(-1) for label in weight.labels])


# Norms.


def _gains(
    context: Context, shape: tuple[int, ...], weight: Value | None, bias: Value | None, first: int, tag: str
) -> Value:
    """The result of a norm: as its gain scales; without one it has to stay."""
    ndim = len(shape)
    if weight is None:
        if bias is not None:
            context.kill(bias)
        return Value(shape)

    def placed(value: Value) -> Value:
        behind = ndim - first - value.ndim
        return context.value(
            shape, [label.reshape(*(1,) * first, *label.shape, *(1,) * behind) for label in value.labels]
        )

    gain = placed(weight)
    for label in gain.labels:
        context.ledger.elementwise(label)
        context.ledger.tag(tag, label)
    return gain if bias is None else context.value(shape, context.equal([gain, placed(bias)]))


@_rule("layer_norm")
def _layer_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    normalized: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    context.kill(x, f"{context.name} normalises it")
    return _gains(context, shape, weight, bias, len(shape) - len(normalized), "norm")


@_rule("rms_norm")
def _rms_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    normalized: Sequence[int],
    weight: Value | None = None,
    *_: Any,
) -> Value:
    context.kill(x, f"{context.name} normalises it")
    return _gains(context, shape, weight, None, len(shape) - len(normalized), "norm")


@_rule("group_norm")
def _group_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    context.kill(x, f"{context.name} normalises it")
    return _gains(context, shape, weight, bias, 1, "norm")


@_rule("instance_norm")
def _instance_norm(
    context: Context, shape: tuple[int, ...], x: Value, weight: Value | None, bias: Value | None, *_: Any
) -> Value:
    context.kill(x, f"{context.name} normalises it")
    return _gains(context, shape, weight, bias, 1, "norm")


@_rule("batch_norm")
def _batch_norm(
    context: Context,
    shape: tuple[int, ...],
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    variance: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Value:
    x = _constant(context, x, (0, *range(2, x.ndim)))
    context.kill_labels(x.labels[1:], tentative=True)
    known = mean is not None and variance is not None and mean.buffer is not None and variance.buffer is not None
    if not known and not training:
        context.kill(x)
    elif x.labels:
        label = x.labels[0]
        if label.shape[1] == 1:
            label = label.expand(1, x.shape[1], *(1,) * (x.ndim - 2))
        label = label.reshape(-1)
        context.ledger.elementwise(label)
        context.ledger.tag("before batch norm, training" if training else "before batch norm", label)
        context.ledger.touch(context.operation, label, ())
        if known:
            assert mean is not None and variance is not None
            for each, epsilon in ((mean, None), (variance, float(eps))):
                slot = context.ledger.slot((each.buffer, "buffer"), str(each.buffer), tuple(each.shape), epsilon)
                context.ledger.equal(label, slot)
                if str(each.buffer) in context.ledger.used:
                    context.kill_labels([slot], "running statistics of several layers")
                context.ledger.used.add(str(each.buffer))
    return _gains(context, shape, weight, bias, 1, "batch norm")


# Attention.


@_rule("scaled_dot_product_attention")
def _attention(
    context: Context,
    shape: tuple[int, ...],
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if mask is not None:
        context.kill(mask)
    if enable_gqa:
        key, value = (_repeated(context, each, query.shape[-3]) for each in (key, value))
    ndim = max(query.ndim, key.ndim, value.ndim)
    batch = _LETTERS[: ndim - 2]
    names = [batch[len(batch) - (each.ndim - 2) :] for each in (query, key, value)]
    scores = context.contract(query, f"{names[0]}xz", key, f"{names[1]}yz", f"{batch}xy", tag="attention")
    context.kill_labels(scores, "scores of an attention")
    fixed = Value((*shape[:-1], value.shape[-2]))
    labels = context.contract(fixed, f"{batch}xy", value, f"{names[2]}yz", f"{batch}xz", tag="attention")
    return context.value(shape, labels)


def _repeated(context: Context, value: Value, heads: int) -> Value:
    own = value.shape[-3]
    labels = [
        label.repeat_interleave(heads // own, -3) if label.shape[-3] > 1 else label for label in value.labels
    ]
    return context.value((*value.shape[:-3], heads, *value.shape[-2:]), labels)


# Elementwise operations.


@_rule("add", "sub", "maximum", "minimum", "add_scalar")
def _add(context: Context, shape: tuple[int, ...], left: Any, right: Any, **_: Any) -> Value:
    if not isinstance(left, Value) or not isinstance(right, Value):
        number, value = (left, right) if isinstance(right, Value) else (right, left)
        if number != 0:
            context.kill(value, f"{context.name} of a number")
            return Value(shape)
        return context.value(shape, value.labels)
    labels = context.equal([left, right])
    if context.name in ("maximum", "minimum"):
        for label in labels:
            context.ledger.elementwise(label)
    return context.value(shape, labels)


@_rule("mul")
def _mul(context: Context, shape: tuple[int, ...], left: Any, right: Any) -> Value:
    if not isinstance(left, Value) or not isinstance(right, Value):
        value = left if isinstance(left, Value) else right
        return context.value(shape, value.labels)
    ndim = len(shape)
    result = []
    for value, other in ((left, right), (right, left)):
        wide = (1,) * (ndim - other.ndim) + other.shape
        for each in value.labels:
            label = each.reshape((1,) * (ndim - each.ndim) + tuple(each.shape))
            along = tuple(dim for dim in varying(label) if wide[dim] > 1)
            if along and along == varying(label):
                context.ledger.elementwise(label)
                context.ledger.tag("gain" if value.parameter or other.parameter else "product", label)
            elif along:
                context.ledger.touch(context.operation, label, along, scales=True)
            result.append(label)
    return context.value(shape, result)


@_rule("div")
def _div(context: Context, shape: tuple[int, ...], left: Any, right: Any, **keywords: Any) -> Value | None:
    if keywords.get("rounding_mode") is not None or not isinstance(left, Value):
        return None
    if isinstance(right, Value):
        context.kill(right)
        right = Value(right.shape)
    return _mul(context, shape, left, right)


@_rule("neg", "clone", "contiguous", "alias", "detach", "to", "_to_copy", "lift_fresh_copy", "type_as", "identity")
def _same(context: Context, shape: tuple[int, ...], x: Value, *others: Any, **_: Any) -> Value:
    return context.value(shape, x.labels)


@_rule("relu", "leaky_relu", "abs")
def _homogeneous(context: Context, shape: tuple[int, ...], x: Value, *_: Any) -> Value:
    for label in x.labels:
        context.ledger.elementwise(label)
    return context.value(shape, x.labels)


@_rule("prelu")
def _prelu(context: Context, shape: tuple[int, ...], x: Value, weight: Value) -> Value:
    context.kill(weight, silent=True)
    return _homogeneous(context, shape, x)


@_rule("gt", "lt", "ge", "le", "eq", "ne", "sign")
def _sign(context: Context, shape: tuple[int, ...], x: Value, number: Any = 0) -> Value | None:
    """The sign of what is scaled by a positive number stays."""
    if isinstance(number, Value) or number != 0:
        return None
    _homogeneous(context, shape, x)
    return Value(shape)


@_rule("where")
def _where(context: Context, shape: tuple[int, ...], condition: Value, left: Any, right: Any) -> Value | None:
    if condition.labels:
        return None
    sides = [each for each in (left, right) if isinstance(each, Value)]
    if not sides or any(each != 0 for each in (left, right) if not isinstance(each, Value)):
        return None
    labels = context.equal(sides) if len(sides) == 2 else sides[0].labels
    return _homogeneous(context, shape, context.value(shape, labels))


@_rule("clamp", "clamp_min")
def _clamp(context: Context, shape: tuple[int, ...], x: Value, low: Any = None, high: Any = None) -> Value | None:
    if low in (0, None) and high in (0, None) and not isinstance(low, Value) and not isinstance(high, Value):
        return _homogeneous(context, shape, x)
    return None


@_rule("dropout", "feature_dropout")
def _dropout(context: Context, shape: tuple[int, ...], x: Value, p: float, train: bool) -> Value:
    return _homogeneous(context, shape, x) if train and p > 0 else context.value(shape, x.labels)


@_rule("masked_fill")
def _masked_fill(context: Context, shape: tuple[int, ...], x: Value, mask: Value, number: Any) -> Value | None:
    if isinstance(number, Value) or number != 0:
        return None
    context.kill(mask)
    return _homogeneous(context, shape, x)


# Pooling.


def _pool(name: str, dims: int, homogeneous: bool) -> None:
    def rule(context: Context, shape: tuple[int, ...], x: Value, *_: Any, **__: Any) -> Value:
        x = _constant(context, x, range(x.ndim - dims, x.ndim))
        return (_homogeneous if homogeneous else _same)(context, shape, x)

    RULES[name] = rule


for _dims in (1, 2, 3):
    for _name in (f"avg_pool{_dims}d", f"adaptive_avg_pool{_dims}d", f"upsample_nearest{_dims}d"):
        _pool(_name, _dims, False)
    _pool(f"max_pool{_dims}d", _dims, True)
for _name, _dims in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3)):
    _pool(f"upsample_{_name}", _dims, False)


@_rule("mean", "sum", "amax", "amin")
def _reduce(
    context: Context, shape: tuple[int, ...], x: Value, dims: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % x.ndim for dim in dims]
    x = _constant(context, x, dims)
    labels = list(x.labels)
    if not keepdim:
        kept = [dim for dim in range(x.ndim) if dim not in dims]
        labels = [label.permute(*kept, *dims).reshape([label.shape[dim] for dim in kept]) for label in labels]
    result = context.value(shape, labels)
    return result if context.name in ("mean", "sum") else _homogeneous(context, shape, result)


@_rule("constant_pad_nd", "pad")
def _pad(context: Context, shape: tuple[int, ...], x: Value, pads: Sequence[int], *rest: Any) -> Value | None:
    if any(each not in (0, "constant", None) for each in rest):
        return None
    padded = [x.ndim - 1 - i for i in range(len(pads) // 2) if pads[2 * i] or pads[2 * i + 1]]
    return context.value(shape, _constant(context, x, padded).labels)


# Shapes.


_RESHAPING = "view reshape _unsafe_view flatten unflatten view_as reshape_as".split()
_EXPANDING = "expand expand_as".split()
_MOVING = (
    "permute transpose t squeeze unsqueeze select slice narrow split split_with_sizes chunk unbind movedim repeat "
    "repeat_interleave flip roll unfold pixel_shuffle channel_shuffle numpy_T mT swapaxes swapdims"
).split()


def _reshape(context: Context, shape: tuple[int, ...], x: Value, *arguments: Any, **__: Any) -> Value | None:
    if any(isinstance(each, torch.dtype) for each in arguments):
        return None
    return context.value(shape, [label.expand(x.shape).reshape(shape) for label in x.labels])


def _expand(context: Context, shape: tuple[int, ...], x: Value, *_: Any, **__: Any) -> Value:
    return context.value(shape, x.labels)


def _moved(context: Context, shape: Any, x: Value, *arguments: Any, **keywords: Any) -> Any:
    results = [context.function(label.expand(x.shape), *arguments, **keywords) for label in x.labels]
    if isinstance(shape, list):
        return [context.value(each, [result[i] for result in results]) for i, each in enumerate(shape)]
    return context.value(shape, results)


RULES.update(dict.fromkeys(_RESHAPING, _reshape), **dict.fromkeys(_EXPANDING, _expand), **dict.fromkeys(_MOVING, _moved))


@_rule("cat", "stack")
def _cat(context: Context, shape: tuple[int, ...], values: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(shape)
    stacked = context.name == "stack"
    # Of old, torch lets an empty vector be joined to anything.
    values = [value for value in values if stacked or value.ndim == len(shape)]
    result = []
    for place in range(max(len(value.labels) for value in values)):
        parts = []
        for value in values:
            label = value.labels[place] if place < len(value.labels) else torch.zeros((1,) * value.ndim, dtype=torch.int64)
            parts.append((label.unsqueeze(dim) if stacked else label, 1 if stacked else value.shape[dim]))
        common = torch.broadcast_shapes(*([n if i != dim else 1 for i, n in enumerate(p.shape)] for p, _ in parts))
        wide = [part.expand([size if i == dim else n for i, n in enumerate(common)]) for part, size in parts]
        result.append(torch.cat(wide, dim))
    return context.value(shape, result)


FRESH = frozenset(
    "linear addmm matmul mm bmm baddbmm conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d "
    "conv_transpose3d batch_norm layer_norm rms_norm group_norm relu leaky_relu prelu add sub mul div embedding cat "
    "stack max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d relu_ leaky_relu_ add_ sub_ mul_ div_ "
    "clone scaled_dot_product_attention".split()
)
"""Operations whose result is memory of its own, or memory that an in-place operation was allowed to overwrite."""

