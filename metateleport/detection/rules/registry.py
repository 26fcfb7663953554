"""The table of rules, and helpers that several rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metateleport.detection.values import Context, Value, varying

__all__ = ["LETTERS", "RULES", "Rule", "constant", "homogeneous", "rule", "same", "without"]

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}
"""By the operation's name: gets the context, the shape of the result and the arguments, gives the result's value."""

LETTERS = "abcdefghijklmnopqrstuvw"


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def without(value: Value, context: Context, dims: Sequence[int]) -> Value:
    """The value without the labels that vary along some dimensions; those have to stay."""
    bad = [label for label in value.labels if set(varying(label)) & set(dims)]
    context.kill_labels(bad, silent=True)
    kept = tuple(label for label in value.labels if not set(varying(label)) & set(dims))
    return Value(value.shape, kept, value.parameter, value.buffer)


def constant(context: Context, value: Value, dims: Sequence[int]) -> Value:
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


def same(context: Context, shape: tuple[int, ...], x: Value, *others: Any, **_: Any) -> Value:
    return context.value(shape, x.labels)


def homogeneous(context: Context, shape: tuple[int, ...], x: Value, *_: Any) -> Value:
    for label in x.labels:
        context.ledger.elementwise(label)
    return context.value(shape, x.labels)
