"""Norms: the output does not depend on the input's scale, and scales with the gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metateleport.detection.rules.registry import constant, rule
from metateleport.detection.values import Context, Value


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

    for each in (weight, bias):
        if each is not None and each.parameter is not None and each.shape == (1,):
            context.ledger.slot((each.parameter, 0), each.parameter, (1,))
    gain = placed(weight)
    for label in gain.labels:
        context.ledger.elementwise(label)
        context.ledger.tag(tag, label)
    return gain if bias is None else context.value(shape, context.equal([gain, placed(bias)]))


@rule("layer_norm")
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


@rule("rms_norm")
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


@rule("group_norm")
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


@rule("instance_norm")
def _instance_norm(
    context: Context, shape: tuple[int, ...], x: Value, weight: Value | None, bias: Value | None, *_: Any
) -> Value:
    context.kill(x, f"{context.name} normalises it")
    return _gains(context, shape, weight, bias, 1, "norm")


@rule("batch_norm")
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
    x = constant(context, x, (0, *range(2, x.ndim)))
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
            assert mean is not None
            assert variance is not None
            for each, epsilon in ((mean, None), (variance, float(eps))):
                slot = context.ledger.slot((each.buffer, "buffer"), str(each.buffer), tuple(each.shape), epsilon)
                context.ledger.equal(label, slot)
                if str(each.buffer) in context.ledger.used:
                    context.kill_labels([slot], "running statistics of several layers")
                context.ledger.used.add(str(each.buffer))
    return _gains(context, shape, weight, bias, 1, "batch norm")
