"""Attention, as one operation."""

from __future__ import annotations

from metateleport.detection.rules.registry import LETTERS, rule
from metateleport.detection.values import Context, Value


@rule("scaled_dot_product_attention")
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
    batch = LETTERS[: ndim - 2]
    names = [batch[len(batch) - (each.ndim - 2) :] for each in (query, key, value)]
    scores = context.contract(query, f"{names[0]}xz", key, f"{names[1]}yz", f"{batch}xy", tag="attention")
    context.kill_labels(scores, "scores of an attention")
    fixed = Value((*shape[:-1], value.shape[-2]))
    labels = context.contract(fixed, f"{batch}xy", value, f"{names[2]}yz", f"{batch}xz", tag="attention")
    return context.value(shape, labels)


def _repeated(context: Context, value: Value, heads: int) -> Value:
    own = value.shape[-3]
    labels = [label.repeat_interleave(heads // own, -3) if label.shape[-3] > 1 else label for label in value.labels]
    return context.value((*value.shape[:-3], heads, *value.shape[-2:]), labels)
