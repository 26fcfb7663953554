"""Layers: products of an input with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.detection.rules.registry import LETTERS, constant, rule, without
from metateleport.detection.values import Context, Value, varying


def _add_bias(
    context: Context, labels: Sequence[Tensor], shape: tuple[int, ...], bias: Value | None, dim: int
) -> Value:
    result = context.value(shape, labels)
    if bias is None:
        return result
    ndim = len(shape)
    moved = [label.reshape([label.numel() if i == dim % ndim else 1 for i in range(ndim)]) for label in bias.labels]
    return context.value(shape, context.equal([result, context.value(shape, moved)]))


def _of_one_feature(
    context: Context, x: Value, weight: Value, bias: Value | None, out_axis: int
) -> tuple[Value, Value]:
    """The arguments of a layer, after what axes of one entry ask for: labels of one variable, which vary nowhere.

    What a layer of one unit outputs scales as a whole, and is undone by the next weight as a whole.
    """
    ledger, name = context.ledger, weight.parameter
    if name is None:
        return x, weight
    if weight.shape[out_axis] == 1:
        ledger.slot((name, out_axis), name, (1,) * weight.ndim)
        if bias is not None and bias.parameter is not None:
            ledger.slot((bias.parameter, 0), bias.parameter, (1,))
    single = [label for label in x.labels if not varying(label)]
    met: list[Tensor] = []
    for label in single:
        met.append(ledger.slot((name, "one", len(met)), name, (1,) * weight.ndim))
        ledger.equal(label.reshape(()), met[-1].reshape(()), -1, tentative=True)
    slots = [slot.variables for key, slot in ledger.slots.items() if key[:2] == (name, "one")]
    context.kill_labels([slot for slot in slots if not any(slot is each for each in met)], silent=True)
    ones = [int(slot) for slot in slots]
    x = Value(x.shape, tuple(label for label in x.labels if varying(label)), x.parameter, x.buffer)
    kept = tuple(label for label in weight.labels if varying(label) or int(label) not in ones)
    return x, Value(weight.shape, kept, name)


@rule("linear")
def _linear(context: Context, shape: tuple[int, ...], x: Value, weight: Value, bias: Value | None = None) -> Value:
    seen = x
    x, weight = _of_one_feature(context, x, weight, bias, 0)
    batch = LETTERS[: x.ndim - 1]
    labels = context.contract(x, f"{batch}z", weight, "yz" if weight.ndim == 2 else "z", f"{batch}y"[: len(shape)])
    result = _add_bias(context, labels, shape, bias, -1)
    context.affine(weight, bias, 0)
    context.watch(weight, seen, result, -1)
    return result


@rule("addmm")
def _addmm(
    context: Context, shape: tuple[int, ...], bias: Value, x: Value, weight: Value, beta: float = 1, alpha: float = 1
) -> Value:
    labels = context.contract(x, "az", weight, "zy", "ay")
    context.affine(weight, bias, 1)
    return context.value(shape, context.equal([context.value(shape, labels), bias]))


@rule("matmul", "mm", "bmm")
def _matmul(context: Context, shape: tuple[int, ...], left: Value, right: Value) -> Value:
    batch = LETTERS[: max(left.ndim, right.ndim) - 2] if max(left.ndim, right.ndim) > 2 else ""
    left_names = (batch[len(batch) - (left.ndim - 2) :] if left.ndim > 2 else "") + ("x" if left.ndim > 1 else "") + "z"
    right_names = (batch[len(batch) - (right.ndim - 2) :] if right.ndim > 2 else "") + ("zy" if right.ndim > 1 else "z")
    out = batch + ("x" if left.ndim > 1 else "") + ("y" if right.ndim > 1 else "")
    both = left.parameter is None and right.parameter is None
    labels = context.contract(left, left_names, right, right_names, out, tag="attention" if both else "")
    return context.value(shape, labels)


@rule("baddbmm")
def _baddbmm(context: Context, shape: tuple[int, ...], added: Value, left: Value, right: Value, **_: float) -> Value:
    product = _matmul(context, shape, left, right)
    return context.value(shape, context.equal([product, added]))


@rule("einsum")
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


@rule("conv1d", "conv2d", "conv3d", "convolution")
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


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
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
    ndim, seen = x.ndim, x
    x = constant(context, x, range(2, ndim))
    if groups == 1:
        x, weight = _of_one_feature(context, x, weight, bias, order[0])
    weight = without(weight, context, range(2, ndim))
    if groups == 1:
        names = "yz" if order == (0, 1) else "zy"
        flat = context.value(x.shape[:2], [label.reshape(label.shape[:2]) for label in x.labels])
        kernel = Value(
            weight.shape[:2], tuple(label.reshape(label.shape[:2]) for label in weight.labels), weight.parameter
        )
        found: Sequence[Tensor] = context.contract(flat, "az", kernel, names, "ay")
    else:
        found = _grouped(context, x, weight, groups)
    labels = [label.reshape(*label.shape, *(1,) * (ndim - 2)) for label in found]
    result = _add_bias(context, labels, shape, bias, 1)
    if groups == 1:
        context.affine(weight, bias, order[0])
    context.watch(weight, seen, result, 1)
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
    context.kill_labels(
        [slot.variables for key, slot in ledger.slots.items() if _is_other(key, own, grouped)], silent=True
    )
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


@rule("embedding")
def _embedding(context: Context, shape: tuple[int, ...], weight: Value, indices: Value, *_: Any) -> Value:
    weight = without(weight, context, (0,))
    context.kill(indices)
    return context.value(shape, [label.reshape(-1) for label in weight.labels])
