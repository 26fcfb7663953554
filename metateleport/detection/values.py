"""Values of the walk: how each entry of a tensor in the graph scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.detection.ledger import Ledger, compressed

__all__ = ["Context", "Value", "varying"]


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Args:
        shape: its shape.
        labels: variables that broadcast to its shape; an entry scales by the exponential of their sum.
        parameter: name of the parameter that it is, unchanged.
        buffer: name of the buffer that it is, unchanged.
    """

    shape: tuple[int, ...]
    labels: tuple[Tensor, ...] = ()
    parameter: str | None = None
    buffer: str | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)


def varying(label: Tensor) -> tuple[int, ...]:
    """The dimensions along which a label is not constant."""
    return tuple(dim for dim in range(label.ndim) if label.shape[dim] > 1)


class Context:
    """One operation, and the equations that its rule may add to the ledger.

    Args:
        ledger: the ledger.
        operation: number of the operation.
        name: of the operation, for reasons.
        module: path of the module that it belongs to, for reasons.
        function: the operation itself, for those that only move entries.
    """

    def __init__(
        self, ledger: Ledger, operation: int, name: str, module: str, function: Callable[..., Any] | None = None
    ) -> None:
        self.ledger, self.operation, self.name, self.module = ledger, operation, name, module
        self.function = function

    def value(self, shape: Sequence[int], labels: Sequence[Tensor] = ()) -> Value:
        """A value without labels that are zero everywhere."""
        shape = tuple(int(size) for size in shape)
        kept = []
        for label in labels:
            label = label.reshape((1,) * (len(shape) - label.ndim) + tuple(label.shape))  # noqa: PLW2901
            label = self.ledger.alive(compressed(label))  # noqa: PLW2901
            if bool(label.any()):
                kept.append(label)
        return Value(shape, tuple(kept))

    def affine(self, weight: Value, bias: Value | None, out_axis: int) -> None:
        """Notes which parameter is added to what a weight gives."""
        if weight.parameter and bias is not None and bias.parameter:
            self.ledger.affine[weight.parameter] = (bias.parameter, out_axis)

    def watch(self, weight: Value, x: Value, result: Value, dim: int) -> None:
        """Records how the inputs and outputs of a layer scale, if it was called as a module."""
        if self.module and weight.parameter == f"{self.module}.weight":
            self.ledger.calls[self.module] = self.ledger.calls.get(self.module, 0) + 1
            for value, seen in ((x, self.ledger.inputs), (result, self.ledger.outputs)):
                if len(value.labels) == 1 and self.module not in seen:
                    label = value.labels[0].movedim(dim, -1)
                    if label.numel() == label.shape[-1]:
                        seen[self.module] = label.reshape(-1).expand(value.shape[dim])

    def kill(self, values: Value | Sequence[Value], reason: str = "", silent: bool = False) -> None:
        """Fixes the scalings of some values."""
        for value in (values,) if isinstance(values, Value) else values:
            self.kill_labels(value.labels, reason, silent)

    def kill_labels(
        self, labels: Sequence[Tensor], reason: str = "", silent: bool = False, tentative: bool = False
    ) -> None:
        """Fixes some labels."""
        text = "" if silent else reason or f"{self.name} is not followed"
        self.ledger.kill(list(labels), text, self.module, tentative)

    def equal(self, values: Sequence[Value], sign: int = 1) -> tuple[Tensor, ...]:
        """Requires that some values scale alike, and returns the labels that they share.

        Labels are matched by the dimensions along which they vary; those without a match have to stay.
        """
        ndim = max(value.ndim for value in values)
        lists = [[_aligned(label, ndim) for label in value.labels] for value in values]
        tentative = any(len(labels) > 1 for labels in lists)
        matched: list[Tensor] = []
        for label in lists[0]:
            partners = []
            for labels in lists[1:]:
                found = next((i for i, other in enumerate(labels) if varying(other) == varying(label)), None)
                if found is not None:
                    partners.append(labels.pop(found))
            if len(partners) == len(values) - 1:
                for other in partners:
                    self.ledger.equal(label, other, sign, tentative)
                matched.append(label)
            else:
                reason = f"{self.name} with a value that does not scale alike"
                self.kill_labels([label, *partners], reason, tentative=tentative)
        for labels in lists[1:]:
            self.kill_labels(labels, f"{self.name} with a value that does not scale alike", tentative=tentative)
        return tuple(matched)

    def contract(
        self, left: Value, left_names: str, right: Value, right_names: str, out_names: str, tag: str = ""
    ) -> tuple[Tensor, ...]:
        """The labels of a product of two values, summed over the names that the result lacks.

        A label that varies along a name that is summed over has to be undone by one of the other value.

        Args:
            left: one value.
            left_names: a letter for each of its dimensions.
            right: the other value; where it is a parameter, slots are added to it as needed.
            right_names: letters of its dimensions.
            out_names: letters of the result's dimensions.
            tag: marks what is summed over.
        """
        wide = "".join(dict.fromkeys(out_names + left_names + right_names))
        summed = {name for name in wide if name not in out_names}
        shared = {name for name in out_names if name in left_names and name in right_names}
        sides = []
        for value, names in ((left, left_names), (right, right_names)):
            passing: list[tuple[Tensor, set[str]]] = []
            meeting: list[tuple[Tensor, set[str]]] = []
            for label in value.labels:
                spread = _spread(label, names, wide)
                along = {wide[dim] for dim in varying(spread)}
                (meeting if along & summed else passing).append((spread, along))
            sides.append((passing, meeting))
        result = []
        for passing, _ in sides:
            for spread, along in passing:
                fibers = along & shared
                if fibers:
                    self.ledger.touch(self.operation, spread, tuple(wide.index(name) for name in sorted(fibers)))
                if tag:
                    self.ledger.tag(f"mixed by {tag}", spread)
                result.append(spread[(slice(None),) * len(out_names) + (0,) * (len(wide) - len(out_names))])
        tentative = len(sides[0][1]) > 1 or len(sides[1][1]) > 1
        waiting = list(sides[1][1])
        extra = 0
        for spread, along in sides[0][1]:
            # Along dimensions that both have, one may be the same for all that the other tells apart (shared heads).
            found = next((i for i, (_, other) in enumerate(waiting) if other ^ along <= shared), None)
            if found is not None:
                partner, other = waiting.pop(found)
                wider, partner = torch.broadcast_tensors(spread, partner)
                self._meet(wider, partner, (along | other) & shared, wide, tag, tentative)
            elif right.parameter is not None and along <= set(right_names) and not along & shared:
                shape = tuple(right.shape[i] if name in along else 1 for i, name in enumerate(right_names))
                key = (right.parameter, "again", tuple(sorted(along)), extra)
                extra += 1
                # A kernel comes without its last dimensions.
                behind = self.ledger.by_parameter[right.parameter][0].variables.ndim - len(shape)
                partner = self.ledger.slot(key, right.parameter, (*shape, *(1,) * behind)).reshape(shape)
                self._meet(spread, _spread(partner, right_names, wide), set(), wide, tag, True)
            else:
                self.kill_labels(
                    [spread], f"{self.name} with a value that cannot undo its scaling", tentative=tentative
                )
        # Without a label on the left the border of the model, or what is said above, holds the right side in place.
        reason = f"{self.name} with a value that cannot undo its scaling"
        silent = not left.labels or right.parameter is not None
        self.kill_labels([spread for spread, _ in waiting], reason, silent, tentative and bool(left.labels))
        return tuple(result)

    def _meet(self, label: Tensor, partner: Tensor, fibers: set[str], wide: str, tag: str, tentative: bool) -> None:
        self.ledger.equal(label, partner, -1, tentative)
        self.ledger.touch(self.operation, label, tuple(wide.index(name) for name in sorted(fibers)))
        if tag:
            self.ledger.tag(tag, label)


def _aligned(label: Tensor, ndim: int) -> Tensor:
    return label.reshape((1,) * (ndim - label.ndim) + tuple(label.shape))


def _spread(label: Tensor, names: str, wide: str) -> Tensor:
    """A label over named dimensions as one over all of `wide`."""
    order = sorted(range(len(names)), key=lambda i: wide.index(names[i]))
    shape = [1] * len(wide)
    for i in order:
        shape[wide.index(names[i])] = label.shape[i]
    return label.permute(order).reshape(shape)
