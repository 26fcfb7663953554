"""How an optimizer's state is carried along when a teleport moves its parameters."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry
from metateleport.symmetries.translation import BiasTranslation
from metateleport.teleporters.base import Move

__all__ = ["StateReport", "cannot_carry", "carry_state", "points_on_the_way"]

# Names of entries in the states of the optimizers of torch and pytorch_optimizer. Covectors are sums of gradients and
# move as the gradient does; squares are sums of squared gradients; roots are largest absolute values of gradients.
_COVECTORS = ("momentum_buffer", "exp_avg", "grad_avg", "prev")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_ROOTS = ("exp_inf",)
# Copies of weights, which move as weights do. An entry of another name is one if it is nearly parallel to the weights
# and about as long.
_WEIGHTS = ("z", "slow_params", "backup_params", "slow", "slow_buffer", "ema", "ax", "anchor", "master_param")
_LEAST_COSINE = 0.9
_MOST_STRETCH = 4.0


@dataclasses.dataclass(frozen=True)
class StateReport:
    """How an optimizer's state was carried through a teleport.

    Args:
        summary: `transport` if every entry was carried exactly, `approximate` if not all were, or `keep` or `reset`.
        entries: for each entry of the state `exact`, `approximate`, `kept` or `reset`.
    """

    summary: str
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)


def cannot_carry(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], symmetries: Sequence[Symmetry] | None
) -> str:
    """Why weights that an optimizer keeps in its state could not move along; empty if they can, or there are none.

    Args:
        optimizer: the optimizer.
        named: the model's parameters.
        symmetries: the symmetries to move along; None for a move along no symmetry.
    """
    kept = sorted(
        {
            key
            for state in _states(optimizer)
            for key in _weights_in(_entries(state, named, dict.fromkeys(named)), named)
        }
    )
    if not kept:
        return ""
    if any("train_mode" in group for group in optimizer.param_groups):
        # Its parameters are a running mean that goes on moving towards the weights in its state.
        return (
            f"{type(optimizer).__name__} trains a running mean of weights that it keeps in its state {kept[0]!r} "
            "(schedule-free): teleport with an optimizer whose weights are the model's"
        )
    told = f"{type(optimizer).__name__} keeps weights in its state {kept[0]!r}, and they can move"
    if symmetries is None:
        return f"{told} along symmetries only"
    loose = [each for each in symmetries if each.exactness != "exact"]
    return f"{told} along exact symmetries only, not along {loose[0].kind}" if loose else ""


def carry_state(
    optimizer: torch.optim.Optimizer,
    how: str,
    named: Mapping[str, nn.Parameter],
    moves: Sequence[Move],
    start: Point,
    warned: set[str],
) -> StateReport:
    """Carries an optimizer's state along a teleport, in place.

    Args:
        optimizer: the optimizer.
        how: `transport`, `keep` or `reset`.
        named: the model's parameters.
        moves: the moves of the teleport, in their order.
        start: where the teleport started.
        warned: names of the entries that a warning was given for; extended here.

    Returns:
        How each entry was carried.
    """
    moves = [move for move in moves if bool(move.size > 0)]
    moved = dict.fromkeys(name for move in moves for name in move.symmetry.parameters)
    if isinstance(optimizer, torch.optim.LBFGS) and how != "keep":
        # It remembers differences of weights and of gradients, flattened over all parameters: it starts anew.
        entries = {key: "reset" for state in optimizer.state.values() for key in state}
        optimizer.state.clear()
        return StateReport("reset", entries)
    said: dict[str, str] = {}
    for state in _states(optimizer):
        said |= _carry(state, how, named, moved, moves, start, optimizer, warned)
    if how != "transport":
        return StateReport(how, said)
    return StateReport("transport" if set(said.values()) <= {"exact"} else "approximate", said)


def _states(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state of an optimizer, and of those inside it that keep their own (Lookahead's)."""
    found, within = [optimizer.state], getattr(optimizer, "optimizer", None)
    if isinstance(within, torch.optim.Optimizer) and within.state is not optimizer.state:
        found += _states(within)
    return found


def _carry(
    state: Any,
    how: str,
    named: Mapping[str, nn.Parameter],
    moved: Mapping[str, None],
    moves: Sequence[Move],
    start: Point,
    optimizer: torch.optim.Optimizer,
    warned: set[str],
) -> dict[str, str]:
    found = _entries(state, named, moved)
    weights = _weights_in(found, named)
    said = dict.fromkeys(weights, "exact")
    for key in weights:
        _move_weights(found[key], moves, start)
    others = {key: kept for key, kept in found.items() if key not in weights}
    if how == "reset":
        _reset(state, [named[name] for name in moved], others, bool(weights))
    if how != "transport":
        return said | dict.fromkeys(others, "kept" if how == "keep" else how)
    carriable: dict[str, Tensors] = {}
    for key, kept in others.items():
        shaped = all(isinstance(value, Tensor) and value.shape == named[name].shape for name, value in kept.items())
        if shaped and _kind_of(key, found) != "unknown":
            carriable[key] = kept
        else:
            said[key] = "kept"
            _warn_of(key, optimizer, warned)
    places = points_on_the_way(moves, start)
    carried = {key: _carried(_kind_of(key, found), kept, moves, places) for key, kept in carriable.items()}
    if "square_avg" in carriable:
        carried |= _of_rmsprop(carriable, moves, places)
    for key, (tensors, exact) in carried.items():
        same = all(tensors[name] is value for name, value in carriable[key].items())
        said[key] = "exact" if exact else "kept" if same else "approximate"
        for name, value in carriable[key].items():
            if tensors[name] is not value:
                value.copy_(tensors[name])
    return {key: said[key] for key in found}


def _reset(state: Any, moved: Sequence[nn.Parameter], others: Mapping[str, Mapping[str, Any]], filled: bool) -> None:
    """Drops the state of what moved; if it holds weights, which its optimizer does not set up again, zeros the rest."""
    if not filled:
        for parameter in moved:
            state.pop(parameter, None)
        return
    for value in (value for kept in others.values() for value in kept.values() if isinstance(value, Tensor)):
        value.zero_()


def _weights_in(found: Mapping[str, Mapping[str, Any]], named: Mapping[str, nn.Parameter]) -> list[str]:
    """Entries that are copies of weights: known by name, or nearly parallel to the weights of all parameters."""
    weights = []
    for key, kept in found.items():
        if not all(_like_weights(value, named[name]) for name, value in kept.items()):
            continue
        if _kind_of(key, found) != "unknown" or _own_coordinates(key, found):
            continue
        both = squares = own = 0.0
        for name, value in kept.items():
            one, other = value.detach().double(), named[name].detach().double()
            both, squares = both + float((one * other).sum()), squares + float(one.square().sum())
            own += float(other.square().sum())
        parallel = both > 0 and both >= _LEAST_COSINE * (squares * own) ** 0.5
        # Momenta of a loss that pulls weights to zero are parallel to them too.
        alike = own <= _MOST_STRETCH**2 * squares and squares <= _MOST_STRETCH**2 * own
        if key in _WEIGHTS or (parallel and alike):
            weights.append(key)
    return weights


def _like_weights(value: Any, parameter: nn.Parameter) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
    return dense and value.shape == parameter.shape


def _move_weights(kept: Tensors, moves: Sequence[Move], start: Point) -> None:
    """Moves weights that an optimizer keeps, in place, by the elements that moved the model's.

    The actions are linear, so that averages of the two (as in schedule-free optimizers) move along too.
    """
    here = {name: kept.get(name, value).to(value.dtype) for name, value in start.parameters.items()}
    point = Point(here, activations=start.activations, loss=start.loss)
    for move in moves:
        point = move.symmetry.act(move.element, point)
    for name, value in kept.items():
        value.copy_(point.parameters[name])


def _entries(state: Any, named: Mapping[str, nn.Parameter], moved: Mapping[str, None]) -> dict[str, dict[str, Any]]:
    """The state's tensors of the moved parameters, by entry and parameter; counters and settings are left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in moved:
        for key, value in state.get(named[name], {}).items():
            counter = isinstance(value, Tensor) and value.ndim == 0 and (key == "step" or named[name].ndim > 0)
            if not counter and not isinstance(value, bool | int | float | str | None):
                found.setdefault(key, {})[name] = value
    return found


def _warn_of(key: str, optimizer: torch.optim.Optimizer, warned: set[str]) -> None:
    if key not in warned:
        warned.add(key)
        warnings.warn(
            f"the entry {key!r} in the state of {type(optimizer).__name__} is not known to be made of gradients: a "
            "teleport keeps it as it is; state='reset' drops it instead",
            stacklevel=6,
        )


def _of_rmsprop(
    entries: Mapping[str, Tensors], moves: Sequence[Move], places: Sequence[Point]
) -> dict[str, tuple[Tensors, bool]]:
    """RMSprop's entries: squares about a mean, which stay positive, and sums of gradients over roots of the squares."""
    squares, means, ratios = (entries.get(key, {}) for key in ("square_avg", "grad_avg", "momentum_buffer"))
    spread = {
        name: (value - means[name].square()).clamp_min(0) if name in means else value for name, value in squares.items()
    }
    found: dict[str, tuple[Tensors, bool]] = {}
    carried, exact = _carried("square", spread, moves, places)
    if means:
        moved, _ = _carried("covector", means, moves, places)
        # Larger by a little more than rounding.
        room = {name: 1 + 8 * torch.finfo(value.dtype).eps for name, value in moved.items()}
        found["square_avg"] = (
            {name: value + room[name] * moved[name].square() for name, value in carried.items()},
            exact,
        )
    if ratios:
        sums = {name: value * spread[name].sqrt() for name, value in ratios.items()}
        moved, _ = _carried("covector", sums, moves, places)
        found["momentum_buffer"] = (
            {name: torch.where(carried[name] > 0, value / carried[name].sqrt(), 0.0) for name, value in moved.items()},
            exact,
        )
    return found


def _kind_of(key: str, entries: Mapping[str, Any]) -> str:
    """The kind of an entry; the same name may mean something else beside other entries."""
    if _own_coordinates(key, entries):
        return "unknown"
    for kind, names in (("covector", _COVECTORS), ("square", _SQUARES), ("root", _ROOTS)):
        if key in names:
            return kind
    return "unknown"


def _own_coordinates(key: str, entries: Mapping[str, Any]) -> bool:
    """Whether an entry is in coordinates of the optimizer's own, which no action is known in."""
    # Its last step, which is preconditioned; on a quadratic it comes to be parallel to the weights.
    of_shampoo = key == "momentum_buffer" and "pre_cond_0" in entries
    # In the eigenbasis of its preconditioners.
    of_soap = key == "exp_avg_sq" and "GG" in entries
    return of_shampoo or of_soap


def points_on_the_way(moves: Sequence[Move], start: Point) -> list[Point]:
    """The points that each move acted at; of actions that are the same everywhere, the start."""
    # Without gradients and cotangents, so that no move rebuilds a part of the backward pass.
    places = [Point(start.parameters, activations=start.activations, loss=start.loss)]
    placed = any(move.symmetry.reads_place for move in moves)
    for move in moves[:-1]:
        places.append(move.symmetry.act(move.element, places[-1]) if placed else places[-1])
    return places[: len(moves)]


def _carried(kind: str, kept: Tensors, moves: Sequence[Move], places: Sequence[Point]) -> tuple[Tensors, bool]:
    """The tensors after all moves, and whether they are exact."""
    tensors = {name: value.square() for name, value in kept.items()} if kind == "root" else dict(kept)
    exact = True
    for move, point in zip(moves, places, strict=True):
        own = {name: tensors[name].to(move.element.dtype) for name in move.symmetry.parameters if name in tensors}
        carry = move.symmetry.carry_covectors if kind == "covector" else move.symmetry.carry_squares
        found, well = carry(move.element, own, point)
        tensors.update(found)
        exact = exact and well and not _lacks_a_bias(move, own)
    if kind == "root":
        tensors = {name: value.sqrt() for name, value in tensors.items()}
    return tensors, exact


def _lacks_a_bias(move: Move, own: Tensors) -> bool:
    """Whether a translation needs the bias's entry to carry that of a weight, and the optimizer has none there.

    Optimizers that step weights and biases by different rules, as Muon with Adam, have none.
    """
    symmetry = move.symmetry
    return isinstance(symmetry, BiasTranslation) and any(
        each.weight in own and each.bias not in own for each in symmetry.absorbers
    )
