"""How an optimizer's state comes along when a teleport moves its parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.point import Point, Tensors
from metateleport.teleporters.base import Move

__all__ = ["carry_state", "plain", "restored"]

# Names in the states of torch's optimizers. First-order ones are sums of gradients, so they go with the gradient;
# second-order ones are sums of squared gradients, roots are largest absolute values of gradients.
_COVECTORS = ("momentum_buffer", "exp_avg", "grad_avg", "prev")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_ROOTS = ("exp_inf",)


def carry_state(
    optimizer: torch.optim.Optimizer,
    how: str,
    named: Mapping[str, nn.Parameter],
    moves: Sequence[Move],
    start: Point,
    warned: set[str],
) -> str:
    """Brings an optimizer's state along, in place.

    Args:
        optimizer: whose state it is.
        how: `transport`, `keep` or `reset`.
        named: the model's parameters.
        moves: what each symmetry did, in the order travelled.
        start: where the teleport started.
        warned: names of the entries that were warned of already; added to.

    Returns:
        What was done: `transport`, `approximate`, `keep` or `reset`.
    """
    if how == "keep":
        return how
    moves = [move for move in moves if bool(move.size > 0)]
    moved = dict.fromkeys(name for move in moves for name in move.symmetry.parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        # Its memory is differences of weights and of gradients of all parameters, flattened: a new start.
        optimizer.state.clear()
        return "reset"
    if how == "reset":
        for name in moved:
            optimizer.state.pop(named[name], None)
        return how
    entries: dict[str, Tensors] = {}
    for name in moved:
        for key, value in optimizer.state.get(named[name], {}).items():
            if isinstance(value, Tensor) and value.shape == named[name].shape and key != "step":
                entries.setdefault(key, {})[name] = value
    exact = True
    carried = {key: _carried(_kind_of(key, entries), kept, moves, start) for key, kept in entries.items()}
    if "square_avg" in entries and "grad_avg" in entries:
        carried["square_avg"] = _about_the_mean(entries["square_avg"], entries["grad_avg"], moves, start)
    for key, (tensors, well) in carried.items():
        exact = exact and well
        if tensors is entries[key] and key not in warned:
            warned.add(key)
            warnings.warn(
                f"the state {key!r} of {type(optimizer).__name__} is not known to be made of gradients: a teleport "
                "keeps it as it is; state='reset' drops it instead",
                stacklevel=5,
            )
        for name, value in entries[key].items():
            if tensors[name] is not value:
                value.copy_(tensors[name])
    return "transport" if exact else "approximate"


def _about_the_mean(squares: Tensors, means: Tensors, moves: Sequence[Move], start: Point) -> tuple[Tensors, bool]:
    """Means of squares, carried so that they stay above the squares of the means, which a centred optimizer needs."""
    spread = {name: (value - means[name].square()).clamp_min(0) for name, value in squares.items()}
    carried, exact = _carried("square", spread, moves, start)
    moved, _ = _carried("covector", means, moves, start)
    # By a little more than rounding takes away.
    room = {name: 1 + 8 * torch.finfo(value.dtype).eps for name, value in moved.items()}
    return {name: value + room[name] * moved[name].square() for name, value in carried.items()}, exact


def _kind_of(key: str, entries: Mapping[str, Tensors]) -> str:
    if key == "momentum_buffer" and "square_avg" in entries:
        # RMSprop sums gradients over their own root mean square, which a diagonal group leaves alone.
        return "normalised"
    for kind, names in (("covector", _COVECTORS), ("square", _SQUARES), ("root", _ROOTS)):
        if key in names:
            return kind
    return "unknown"


def _carried(kind: str, kept: Tensors, moves: Sequence[Move], start: Point) -> tuple[Tensors, bool]:
    """The tensors after all moves, and whether they are exact."""
    if kind == "unknown":
        return kept, False
    if kind == "normalised":
        return dict(kept), all(len(move.symmetry.group.shape) == 1 for move in moves)
    tensors = {name: value.square() for name, value in kept.items()} if kind == "root" else dict(kept)
    exact = True
    # Without gradients and cotangents, so that no move makes its part of the backward pass anew.
    point = Point(start.parameters, activations=start.activations, loss=start.loss)
    for move in moves:
        own = {name: tensors[name].to(move.element.dtype) for name in move.symmetry.parameters if name in tensors}
        carry = move.symmetry.carry_covectors if kind == "covector" else move.symmetry.carry_squares
        found, well = carry(move.element, own, point)
        tensors.update(found)
        exact = exact and well
        if move is not moves[-1]:
            point = move.symmetry.act(move.element, point)
    if kind == "root":
        tensors = {name: value.sqrt() for name, value in tensors.items()}
    return tensors, exact


def plain(value: Any) -> Any:
    """A teleporter's state as dicts, lists, tensors and numbers, which a checkpoint takes."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value.detach() if isinstance(value, Tensor) else value


def restored(like: Any, saved: Any) -> Any:
    """What `plain` was given, of the types of a fresh state.

    Raises:
        ValueError: if the two do not fit together.
    """
    try:
        if isinstance(like, Tensor):
            return torch.as_tensor(saved).to(like).reshape(like.shape)
        if isinstance(like, dict):
            if like.keys() != saved.keys():
                raise ValueError("the entries differ")
            return {key: restored(each, saved[key]) for key, each in like.items()}
        if isinstance(like, tuple | list):
            return type(like)(restored(each, other) for each, other in zip(like, saved, strict=True))
        if dataclasses.is_dataclass(like) and not isinstance(like, type):
            fields = {f.name: restored(getattr(like, f.name), saved[f.name]) for f in dataclasses.fields(like)}
            return dataclasses.replace(like, **fields)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "the saved state of the teleporter does not fit this model and its symmetries: load it with the same "
            f"ones, or take 'teleporting' out of the state ({error})"
        ) from error
    return saved
