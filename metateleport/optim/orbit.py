"""How far all teleports together have moved a model along each symmetry's orbit, and a bound on it."""

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
    r"""The product of all elements that a model was moved by, for each symmetry, and the change of its tensors' norms.

    Many teleports, each within its bound, may still lead far away. So the product of all elements is bounded too: along
    each symmetry by its stretch, and, as several symmetries may move one tensor, by the factor by which all teleports
    have changed each tensor's norm.

    Args:
        max_stretch: the largest stretch or factor that is allowed; None for no bound.

    Raises:
        ValueError: if `max_stretch` is not above one.
    """

    def __init__(self, max_stretch: float | None) -> None:
        check_max_stretch(max_stretch)
        self.max_stretch = math.inf if max_stretch is None else max_stretch
        self.bound = math.inf if max_stretch is None else math.log(max_stretch)
        self.reached: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}

    def shortened(self, moves: Sequence[Move], share: float = 1.0) -> dict[int, Tensor]:
        """Shorter elements for the moves that lead beyond `share` of the bound, by the move's index."""
        found = {}
        for place, move in enumerate(moves):
            group, element = move.symmetry.group, move.element
            if not bool(move.size > 0) or not math.isfinite(self.bound):
                continue
            # Below the bound by a little more than rounding.
            bound = (1 - 1e-4) * share * self.bound
            short = shortened(group, element, self._place(move.symmetry, element), bound)
            if short is not element:
                found[place] = short
        return found

    def unbalanced(self, start: Point, arrived: Point) -> str:
        """A sentence that names a tensor whose norm a teleport would take beyond the bound; empty if there is none."""
        for name, scale in self._scales(start, arrived).items():
            if abs(scale) > max(self.bound, abs(self.scales.get(name, 0.0))) + 1e-6:
                return (
                    f"all teleports together would change the norm of {name!r} by a factor of {math.exp(scale):.3g}, "
                    f"beyond max_stretch={math.exp(self.bound):.3g}"
                )
        return ""

    def go(self, moves: Sequence[Move], start: Point, arrived: Point) -> None:
        """Notes a teleport that was carried out."""
        for move in moves:
            if bool(move.size > 0):
                place = self._place(move.symmetry, move.element)
                self.reached[move.symmetry.key] = move.symmetry.group.compose(move.element, place)
        self.scales = self._scales(start, arrived)

    def stretch(self, symmetries: Sequence[Symmetry]) -> float:
        """The largest stretch or factor until now."""
        places = [(each.group, self.reached[each.key]) for each in symmetries if each.key in self.reached]
        logs = [float(stretch(group, place)) for group, place in places]
        largest = max([*logs, *map(abs, self.scales.values())], default=0.0)
        return math.exp(largest) if largest < 700 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The state as dicts of tensors and numbers."""
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
        """Logarithms of the factors that the norms would have changed by; vectors are left out, as they may be zero."""
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
    """A teleporter that repeats a teleport with given elements.

    Args:
        teleporter: the teleporter that chose the moves; it defines the gain.
        moves: the moves to repeat.
        elements: elements to use instead of those of the moves, by the move's index.
    """

    def __init__(self, teleporter: Teleporter, moves: Sequence[Move], elements: Mapping[int, Tensor]) -> None:
        super().__init__(teleporter.trust_region)
        self.name, self.keeps = teleporter.name, teleporter.keeps
        self.teleporter = teleporter
        self.moves = {id(move.symmetry): (move, elements.get(place)) for place, move in enumerate(moves)}

    def choose(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Chosen, Any]:
        """The given element; its size is the proposed size, reduced as the element was."""
        move, element = self.moves[id(symmetry)]
        if element is None:
            return Chosen(move.element, move.size, move.evaluations), state
        one = symmetry.group.identity(dtype=element.dtype, device=element.device)
        whole = torch.linalg.vector_norm(move.element - one).clamp_min(torch.finfo(element.dtype).tiny)
        share = (torch.linalg.vector_norm(element - one) / whole).clamp_max(1.0)
        # At the bound only rounding is left of a move: it counts as none.
        share = torch.where(share > 1e-4, share, 0.0)
        return Chosen(torch.where(share > 0, element, one), move.size * share, move.evaluations), state

    def gain(self, start: Point, arrived: Point) -> Tensor | None:
        return self.teleporter.gain(start, arrived)


def travel_along(
    teleporter: Teleporter, start: Point, moves: Sequence[Move], elements: Mapping[int, Tensor]
) -> tuple[Point, list[Move]]:
    """Repeats the moves with other elements; a move that was refused stays refused."""
    symmetries = [move.symmetry for move in reversed(moves)]
    arrived, made, _ = travel(Given(teleporter, moves, elements), start, symmetries)
    told = [
        dataclasses.replace(new, refused=old.refused, reason=old.reason, failures=old.failures)
        if bool(old.refused)
        else new
        for new, old in zip(made, moves, strict=True)
    ]
    return arrived, told
