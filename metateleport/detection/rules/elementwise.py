"""Operations on each entry by itself."""

from __future__ import annotations

from typing import Any

import torch

from metateleport.detection.rules.registry import homogeneous, rule, same
from metateleport.detection.values import Context, Value, varying


@rule("add", "sub", "maximum", "minimum")
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


@rule("mul")
def _mul(context: Context, shape: tuple[int, ...], left: Any, right: Any) -> Value:
    if not isinstance(left, Value) or not isinstance(right, Value):
        value = left if isinstance(left, Value) else right
        return context.value(shape, value.labels)
    ndim = len(shape)
    left, right, undone = _undone(context, left, right)
    result = []
    for value, other in ((left, right), (right, left)):
        wide = (1,) * (ndim - other.ndim) + other.shape
        for each in value.labels:
            label = each.reshape((1,) * (ndim - each.ndim) + tuple(each.shape))
            along = tuple(dim for dim in varying(label) if wide[dim] > 1)
            if along and along == varying(label):
                context.ledger.elementwise(label)
                if not undone:
                    context.ledger.tag("gain" if value.parameter or other.parameter else "product", label)
            elif along:
                context.ledger.touch(context.operation, label, along, scales=True)
            result.append(label)
    return context.value(shape, result)


def _undone(context: Context, left: Value, right: Value) -> tuple[Value, Value, bool]:
    """Two factors without what a parameter among them undoes of the other's scaling, and whether it does.

    A vector of gains is a diagonal layer: it has a scaling on its way in, and another on its way out.
    """
    if (left.parameter is None) == (right.parameter is None):
        return left, right, False
    if left.parameter is not None:
        right, left, undone = _undone(context, right, left)
        return left, right, undone
    ledger = context.ledger
    passing: list[torch.Tensor] = []
    met: list[torch.Tensor] = []
    for label in left.labels:
        along = tuple(dim - left.ndim for dim in varying(label))
        if not along or min(along) < -right.ndim or any(right.shape[dim] == 1 for dim in along):
            passing.append(label)
            continue
        spread = tuple(size if dim - right.ndim in along else 1 for dim, size in enumerate(right.shape))
        partner = ledger.slot((right.parameter, "undo", along, len(met)), str(right.parameter), spread)
        if not bool(ledger.alive(partner).any()):
            passing.append(label)
            continue
        met.append(partner)
        ledger.equal(label, partner, -1, tentative=True)
        ledger.elementwise(label)
        ledger.tag("layer scale", label)
    # What undoes in one place has to undo in all.
    slots = [slot.variables for key, slot in ledger.slots.items() if key[:2] == (right.parameter, "undo")]
    context.kill_labels([slot for slot in slots if not any(slot is each for each in met)], silent=True)
    own = tuple(label for label in right.labels if not any(bool(torch.isin(label.max(), slot)) for slot in slots))
    return Value(left.shape, tuple(passing), None, left.buffer), Value(right.shape, own, right.parameter), bool(met)


@rule("div")
def _div(context: Context, shape: tuple[int, ...], left: Any, right: Any, **keywords: Any) -> Value | None:
    if keywords.get("rounding_mode") is not None or not isinstance(left, Value):
        return None
    if isinstance(right, Value):
        context.kill(right)
        right = Value(right.shape)
    return _mul(context, shape, left, right)


rule("neg", "clone", "contiguous", "alias", "detach", "to", "_to_copy", "lift_fresh_copy", "type_as")(same)
rule("relu", "leaky_relu", "abs")(homogeneous)


@rule("prelu")
def _prelu(context: Context, shape: tuple[int, ...], x: Value, weight: Value) -> Value:
    context.kill(weight, silent=True)
    return homogeneous(context, shape, x)


@rule("gt", "lt", "ge", "le", "eq", "ne", "sign")
def _sign(context: Context, shape: tuple[int, ...], x: Value, number: Any = 0) -> Value | None:
    """The sign of what is scaled by a positive number stays."""
    if isinstance(number, Value) or number != 0:
        return None
    homogeneous(context, shape, x)
    return Value(shape)


@rule("where")
def _where(context: Context, shape: tuple[int, ...], condition: Value, left: Any, right: Any) -> Value | None:
    if condition.labels:
        return None
    sides = [each for each in (left, right) if isinstance(each, Value)]
    if not sides or any(each != 0 for each in (left, right) if not isinstance(each, Value)):
        return None
    labels = context.equal(sides) if len(sides) == 2 else sides[0].labels
    return homogeneous(context, shape, context.value(shape, labels))


@rule("clamp", "clamp_min")
def _clamp(context: Context, shape: tuple[int, ...], x: Value, low: Any = None, high: Any = None) -> Value | None:
    if low in (0, None) and high in (0, None) and not isinstance(low, Value) and not isinstance(high, Value):
        return homogeneous(context, shape, x)
    return None


@rule("dropout", "feature_dropout")
def _dropout(context: Context, shape: tuple[int, ...], x: Value, p: float, train: bool) -> Value:
    return homogeneous(context, shape, x) if train and p > 0 else context.value(shape, x.labels)


@rule("masked_fill")
def _masked_fill(context: Context, shape: tuple[int, ...], x: Value, mask: Value, number: Any) -> Value | None:
    if isinstance(number, Value) or number != 0:
        return None
    context.kill(mask)
    return homogeneous(context, shape, x)
