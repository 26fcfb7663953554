"""How far all teleports of an optimizer together have led along each symmetry's orbit, and a bound on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter, travel
from metateleport.teleporters.base import Chosen
from metateleport.teleporters.reach import check_max_stretch, shortened, stretch

__all__ = ["Given", "Orbit", "travel_along"]


class Orbit:
    r"""Products of all elements that a model was moved by, by symmetry, and how its tensors' norms were changed.

    A bound on each teleport bounds nothing when they are many: what has to be bounded is where they lead. Along each
    symmetry that is the stretch of the product of its elements, and where several symmetries meet in one tensor, the
    factor by which teleports have changed the tensor's norm in all.

    Args:
        max_stretch: the largest such factor; None for no bound.

    Raises:
        ValueError: if the bound is not above one.
    """

    def __init__(self, max_stretch: float | None) -> None:
        check_max_stretch(max_stretch)
        self.max_stretch = math.inf if max_stretch is None else max_stretch
        self.bound = math.inf if max_stretch is None else math.log(max_stretch)
        self.reached: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}

    def shortened(self, moves: Sequence[Move], share: float = 1.0) -> dict[int, Tensor]:
        """Elements to take in the place of those that lead beyond a share of the bound, by the move's place."""
        found = {}
        for place, move in enumerate(moves):
            group, element = move.symmetry.group, move.element
            if not bool(move.size > 0) or not math.isfinite(self.bound):
                continue
            # Short of it by a little more than rounding.
            bound = (1 - 1e-4) * share * self.bound
            short = shortened(group, element, self._place(move.symmetry, element), bound)
            if short is not element:
                found[place] = short
        return found

    def unbalanced(self, start: Point, arrived: Point) -> str:
        """The tensor that a move would take beyond the bound, in words; empty if there is none."""
        for name, scale in self._scales(start, arrived).items():
            if abs(scale) > max(self.bound, abs(self.scales.get(name, 0.0))) + 1e-6:
                return (
                    f"all teleports together would change the norm of {name!r} by a factor of {math.exp(scale):.3g}, "
                    f"beyond max_stretch={math.exp(self.bound):.3g}"
                )
        return ""

    def go(self, moves: Sequence[Move], start: Point, arrived: Point) -> None:
        """Remembers a teleport that was carried out."""
        for move in moves:
            if bool(move.size > 0):
                place = self._place(move.symmetry, move.element)
                self.reached[move.symmetry.key] = move.symmetry.group.compose(move.element, place)
        self.scales = self._scales(start, arrived)

    def stretch(self, symmetries: Sequence[Symmetry]) -> float:
        """The largest factor until now."""
        places = [(each.group, self.reached[each.key]) for each in symmetries if each.key in self.reached]
        logs = [float(stretch(group, place)) for group, place in places]
        largest = max([*logs, *map(abs, self.scales.values())], default=0.0)
        return math.exp(largest) if largest < 700 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """What has been reached, as dicts of tensors and numbers."""
        return {"reached": dict(self.reached), "scales": dict(self.scales)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.reached = {key: value.detach().clone() for key, value in state["reached"].items()}
        self.scales = dict(state["scales"])

    def _place(self, symmetry: Symmetry, like: Tensor) -> Tensor:
        found = self.reached.get(symmetry.key)
        if found is None or found.shape != like.shape:
            return symmetry.group.identity(dtype=like.dtype, device=like.device)
        return found.to(like)

    def _scales(self, start: Point, arrived: Point) -> dict[str, float]:
        """Logs of the factors that the tensors' norms would have been changed by; vectors may start at zero."""
        found = dict(self.scales)
        for name, before in start.parameters.items():
            after = arrived.parameters[name]
            if after is before or before.ndim < 2:
                continue
            old, new = float(torch.linalg.vector_norm(before)), float(torch.linalg.vector_norm(after))
            if old > 0 and 0 < new < math.inf:
                found[name] = found.get(name, 0.0) + math.log(new / old)
        return found


class Given(Teleporter):
    """Moves by elements that were chosen already, in the place of the teleporter that chose them.

    Args:
        teleporter: that one; it says what a gain is.
        moves: what it did.
        elements: what to take instead, by the move's place.
    """

    def __init__(self, teleporter: Teleporter, moves: Sequence[Move], elements: Mapping[int, Tensor]) -> None:
        super().__init__(teleporter.trust_region)
        self.name, self.keeps = teleporter.name, teleporter.keeps
        self.teleporter = teleporter
        self.moves = {id(move.symmetry): (move, elements.get(place)) for place, move in enumerate(moves)}

    def choose(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Chosen, Any]:
        """The given element; its size is the proposed one's, in the share that is left of it."""
        move, element = self.moves[id(symmetry)]
        if element is None:
            return Chosen(move.element, move.size, move.evaluations), state
        one = symmetry.group.identity(dtype=element.dtype, device=element.device)
        whole = torch.linalg.vector_norm(move.element - one).clamp_min(torch.finfo(element.dtype).tiny)
        share = (torch.linalg.vector_norm(element - one) / whole).clamp_max(1.0)
        # What rounding leaves at the bound is no move.
        share = torch.where(share > 1e-4, share, 0.0)
        return Chosen(torch.where(share > 0, element, one), move.size * share, move.evaluations), state

    def gain(self, start: Point, arrived: Point) -> Tensor | None:
        return self.teleporter.gain(start, arrived)


def travel_along(
    teleporter: Teleporter, start: Point, moves: Sequence[Move], elements: Mapping[int, Tensor]
) -> tuple[Point, list[Move]]:
    """The same way anew with other elements; what was refused of it stays refused."""
    symmetries = [move.symmetry for move in reversed(moves)]
    arrived, made, _ = travel(Given(teleporter, moves, elements), start, symmetries)
    told = [
        dataclasses.replace(new, refused=old.refused, reason=old.reason, failures=old.failures)
        if bool(old.refused)
        else new
        for new, old in zip(made, moves, strict=True)
    ]
    return arrived, told
