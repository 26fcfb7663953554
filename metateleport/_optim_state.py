"""How an optimizer's state comes along when a teleport moves its parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.point import Point, Tensors
from metateleport.symmetries.translation import BiasTranslation
from metateleport.teleporters.base import Move

__all__ = ["StateReport", "carry_state"]

# Names in the states of the optimizers of torch and of pytorch_optimizer. First-order ones are sums of gradients, so
# they go with the gradient; second-order ones are sums of squared gradients, roots are largest absolute values.
_COVECTORS = ("momentum_buffer", "exp_avg", "grad_avg", "prev")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_ROOTS = ("exp_inf",)


@dataclasses.dataclass(frozen=True)
class StateReport:
    """What became of an optimizer's state in a teleport.

    Args:
        summary: `transport` where all of it is exact, `approximate` where some is not, else `keep` or `reset`.
        entries: for each entry of the state `exact`, `approximate`, `kept` or `reset`.
    """

    summary: str
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)


def carry_state(
    optimizer: torch.optim.Optimizer,
    how: str,
    named: Mapping[str, nn.Parameter],
    moves: Sequence[Move],
    start: Point,
    warned: set[str],
) -> StateReport:
    """Brings an optimizer's state along, in place.

    Args:
        optimizer: whose state it is.
        how: `transport`, `keep` or `reset`.
        named: the model's parameters.
        moves: what each symmetry did, in the order travelled.
        start: where the teleport started.
        warned: names of the entries that were warned of already; added to.

    Returns:
        What became of each entry.
    """
    moves = [move for move in moves if bool(move.size > 0)]
    moved = dict.fromkeys(name for move in moves for name in move.symmetry.parameters)
    if isinstance(optimizer, torch.optim.LBFGS) and how != "keep":
        # Its memory is differences of weights and of gradients of all parameters, flattened: a new start.
        entries = {key: "reset" for state in optimizer.state.values() for key in state}
        optimizer.state.clear()
        return StateReport("reset", entries)
    found = _entries(optimizer, named, moved)
    if how == "keep":
        return StateReport(how, dict.fromkeys(found, "kept"))
    if how == "reset":
        for name in moved:
            optimizer.state.pop(named[name], None)
        return StateReport(how, dict.fromkeys(found, "reset"))
    carriable: dict[str, Tensors] = {}
    said: dict[str, str] = {}
    for key, kept in found.items():
        shaped = all(isinstance(value, Tensor) and value.shape == named[name].shape for name, value in kept.items())
        if shaped and _kind_of(key, found) != "unknown":
            carriable[key] = kept
        else:
            said[key] = "kept"
            _warn_of(key, optimizer, warned)
    carried = {key: _carried(_kind_of(key, found), kept, moves, start) for key, kept in carriable.items()}
    if "square_avg" in carriable:
        carried |= _of_rmsprop(carriable, moves, start)
    for key, (tensors, exact) in carried.items():
        same = all(tensors[name] is value for name, value in carriable[key].items())
        said[key] = "exact" if exact else "kept" if same else "approximate"
        for name, value in carriable[key].items():
            if tensors[name] is not value:
                value.copy_(tensors[name])
    summary = "transport" if set(said.values()) <= {"exact"} else "approximate"
    return StateReport(summary, {key: said[key] for key in found})


def _entries(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], moved: Mapping[str, None]
) -> dict[str, dict[str, Any]]:
    """What the state remembers of the moved parameters, by entry and parameter; counters and settings left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in moved:
        for key, value in optimizer.state.get(named[name], {}).items():
            counter = isinstance(value, Tensor) and value.ndim == 0 and (key == "step" or named[name].ndim > 0)
            if not counter and not isinstance(value, bool | int | float | str | None):
                found.setdefault(key, {})[name] = value
    return found


def _warn_of(key: str, optimizer: torch.optim.Optimizer, warned: set[str]) -> None:
    if key not in warned:
        warned.add(key)
        warnings.warn(
            f"the state {key!r} of {type(optimizer).__name__} is not known to be made of gradients: a teleport "
            "keeps it as it is; state='reset' drops it instead",
            stacklevel=6,
        )


def _of_rmsprop(entries: Mapping[str, Tensors], moves: Sequence[Move], start: Point) -> dict[str, tuple[Tensors, bool]]:
    """Means of squares about the mean, which stay positive, and sums of gradients over the roots of them."""
    squares, means, ratios = (entries.get(key, {}) for key in ("square_avg", "grad_avg", "momentum_buffer"))
    spread = {
        name: (value - means[name].square()).clamp_min(0) if name in means else value for name, value in squares.items()
    }
    found: dict[str, tuple[Tensors, bool]] = {}
    carried, exact = _carried("square", spread, moves, start)
    if means:
        moved, _ = _carried("covector", means, moves, start)
        # By a little more than rounding takes away.
        room = {name: 1 + 8 * torch.finfo(value.dtype).eps for name, value in moved.items()}
        found["square_avg"] = (
            {name: value + room[name] * moved[name].square() for name, value in carried.items()},
            exact,
        )
    if ratios:
        sums = {name: value * spread[name].sqrt() for name, value in ratios.items()}
        moved, _ = _carried("covector", sums, moves, start)
        found["momentum_buffer"] = (
            {name: torch.where(carried[name] > 0, value / carried[name].sqrt(), 0.0) for name, value in moved.items()},
            exact,
        )
    return found


def _kind_of(key: str, entries: Mapping[str, Any]) -> str:
    """What an entry is made of; the same name may mean something else beside other entries."""
    if key == "momentum_buffer" and "pre_cond_0" in entries:
        # Shampoo's is the last step, behind its preconditioners.
        return "unknown"
    if key == "exp_avg_sq" and "GG" in entries:
        # SOAP's squares are those in the eigenbasis of its preconditioners.
        return "unknown"
    for kind, names in (("covector", _COVECTORS), ("square", _SQUARES), ("root", _ROOTS)):
        if key in names:
            return kind
    return "unknown"


def _carried(kind: str, kept: Tensors, moves: Sequence[Move], start: Point) -> tuple[Tensors, bool]:
    """The tensors after all moves, and whether they are exact."""
    tensors = {name: value.square() for name, value in kept.items()} if kind == "root" else dict(kept)
    exact = True
    # Without gradients and cotangents, so that no move makes its part of the backward pass anew.
    point = Point(start.parameters, activations=start.activations, loss=start.loss)
    for move in moves:
        own = {name: tensors[name].to(move.element.dtype) for name in move.symmetry.parameters if name in tensors}
        carry = move.symmetry.carry_covectors if kind == "covector" else move.symmetry.carry_squares
        found, well = carry(move.element, own, point)
        tensors.update(found)
        exact = exact and well and not _lacks_a_bias(move, own)
        if move is not moves[-1]:
            point = move.symmetry.act(move.element, point)
    if kind == "root":
        tensors = {name: value.sqrt() for name, value in tensors.items()}
    return tensors, exact


def _lacks_a_bias(move: Move, own: Tensors) -> bool:
    """Whether a translation moves a weight's entry by that of a bias, which the optimizer keeps elsewhere.

    So do optimizers that step weights and biases by different rules, as Muon with Adam does.
    """
    symmetry = move.symmetry
    return isinstance(symmetry, BiasTranslation) and any(
        each.weight in own and each.bias not in own for each in symmetry.absorbers
    )
