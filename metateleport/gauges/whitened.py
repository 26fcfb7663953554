"""Steps of factors taken in gauges that whiten the other factor, for all pairs of a model at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from metateleport.gauges.directions import Direction, in_gauge
from metateleport.gauges.factors import FactorPair, FactorSide, gathered, spread
from metateleport.gauges.outer import sketch_width, sketched
from metateleport.gauges.roots import Roots, whitening_roots

__all__ = [
    "GAUGES",
    "SIDES",
    "GaugeKind",
    "Sketches",
    "column_squares",
    "directions_in_gauges",
    "roots_of",
    "rows_of",
    "stacks_of",
]

GaugeKind = Literal["whitening", "random", "identity"]
GAUGES: tuple[GaugeKind, ...] = ("whitening", "random", "identity")
"""`whitening` makes the other factor white; `random` has its spectrum in directions of no meaning, to compare with;
`identity` leaves factors as they are."""

SIDES: tuple[FactorSide, FactorSide] = ("out", "in")

_SEED = 20261130


@dataclasses.dataclass
class Sketches:
    """What Shampoo's direction remembers of the rows; a step brings it up to date.

    Args:
        gradients: of the tensors to step, with the task dimension in front.
        memory: of the running means by the pair's number and side, `(tasks,)`; one where a step is left out.
        kept: the sketches by the pair's number and side, `(tasks, rows, q)`; those that are not there start at zero.
    """

    gradients: Mapping[str, Tensor]
    memory: Mapping[tuple[int, FactorSide], Tensor]
    kept: dict[tuple[int, FactorSide], Tensor]

    def brought_up(
        self, pairs: Sequence[FactorPair], numbers: Sequence[int], side: FactorSide, gauges: Tensor
    ) -> Tensor:
        """The sketches of one side of pairs of one shape after this step, pair after pair."""
        rows = [_known(rows_of(pairs[number], side, self.gradients)) for number in numbers]
        shape = (*rows[0].shape[:2], sketch_width(pairs[numbers[0]].size, rows[0].shape[1]))
        none = rows[0].new_zeros(shape)
        olds = [self.kept.get((number, side), none) for number in numbers]
        # Where other tensors of the side have gradients than before, its rows are others.
        olds = [old if old.shape == shape else none for old in olds]
        memory = torch.cat([self.memory[number, side] for number in numbers])
        found = sketched(torch.cat(olds), torch.cat(rows) @ gauges, memory)
        tasks = len(rows[0])
        self.kept.update({(number, side): own for number, own in zip(numbers, found.split(tasks), strict=True)})
        return found


def rows_of(pair: FactorPair, side: FactorSide, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The matrix of k columns of one side, `(tasks, rows, k)`, of those of its tensors that there are; None of none."""
    parts = [gathered(leg, tensors[leg.name]) for leg in pair.legs(side) if leg.name in tensors]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def stacks_of(pairs: Sequence[FactorPair], parameters: Mapping[str, Tensor]) -> list[list[int]]:
    """Numbers of pairs whose factors have the same shapes: each list is stepped in one call.

    Args:
        pairs: of a model.
        parameters: with the task dimension in front; pairs that lack one are left out.
    """
    stacks: dict[tuple[object, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        legs = (*pair.outgoing, *pair.incoming)
        if all(leg.name in parameters for leg in legs):
            shapes = tuple((parameters[leg.name].shape, leg.axis, leg.places.shape, leg.dual) for leg in legs)
            like = parameters[legs[0].name]
            stacks.setdefault((*shapes, like.device, pair.size), []).append(number)
    return list(stacks.values())


def roots_of(
    pairs: Sequence[FactorPair],
    numbers: Sequence[int],
    parameters: Mapping[str, Tensor],
    floors: Sequence[Tensor | float],
    kind: GaugeKind = "whitening",
    swapped: bool = False,
) -> Roots:
    """The gauges of pairs of one shape, `(pairs * tasks, k, m)`, pair after pair.

    Args:
        pairs: of a model.
        numbers: of those of one shape.
        parameters: with the task dimension in front.
        floors: of every pair, a number or `(tasks,)`: see `whitening_roots`.
        kind: of gauge.
        swapped: whether the factors that take features in have full rank, and the floor is on the others.
    """
    sides = [torch.cat([_known(rows_of(pairs[number], side, parameters)) for number in numbers]) for side in SIDES]
    tasks = sides[0].shape[0] // len(numbers)
    floor = torch.cat(
        [torch.as_tensor(floors[number], dtype=sides[0].dtype).to(sides[0].device).expand(tasks) for number in numbers]
    )
    roots = whitening_roots(sides[0], sides[1], floor, swapped)
    if kind != "random":
        return roots
    turn = _turn(sides[0].shape[-1]).to(sides[0])
    return Roots(turn @ roots.incoming, turn @ roots.outgoing)


def _turn(size: int) -> Tensor:
    """A rotation that is the same in every run: with it a metric has its spectrum along other directions."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    return torch.linalg.qr(drawn)[0]


def _known(rows: Tensor | None) -> Tensor:
    assert rows is not None
    return rows


def column_squares(pair: FactorPair, side: FactorSide, gradients: Mapping[str, Tensor]) -> Tensor | None:
    r"""$G^\top G$ of one side, `(tasks, k, k)`: the second moments of Adam's direction in a gauge."""
    rows = rows_of(pair, side, gradients)
    return None if rows is None else rows.mT @ rows


def directions_in_gauges(
    direction: Direction,
    pairs: Sequence[FactorPair],
    parameters: Mapping[str, Tensor],
    covectors: Mapping[str, Tensor],
    floors: Sequence[Tensor | float],
    squares: Mapping[tuple[int, FactorSide], Tensor] | None = None,
    kind: GaugeKind = "whitening",
    swapped: Sequence[bool] | None = None,
    sketches: Sketches | None = None,
) -> dict[str, Tensor]:
    r"""Directions of the tensors of all pairs, each taken in the gauge that whitens the other factor.

    $$W_i \mapsto g_i^{-1} . \mathrm{step}(g_i . W)$$

    Args:
        direction: of the step in the gauge.
        pairs: as `factor_pairs` gives them.
        parameters: of the model, with the task dimension in front.
        covectors: gradients or momenta of the tensors to step, of the same shapes.
        floors: of every pair, a number or `(tasks,)`.
        squares: for Adam's direction, the second moments by the pair's number and side.
        kind: of gauge.
        swapped: of every pair, whether the floor is on the factor that puts out; nowhere if not given.
        sketches: for Shampoo's direction; brought up to date.

    Returns:
        For the tensors of pairs that have covectors; entries that no pair moves are zero.

    Example:
        >>> from torch import nn
        >>> from metateleport import LinearPair
        >>> from metateleport.gauges.factors import factor_pairs
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)).requires_grad_(False)
        >>> weights = {name: value.unsqueeze(0) for name, value in model.named_parameters()}
        >>> pairs = factor_pairs([LinearPair(model, "0", "1", frozen=True)])
        >>> step = directions_in_gauges("descent", pairs, weights, {"1.weight": torch.ones(1, 4, 2)}, [0.1])
        >>> v = weights["0.weight"][0]
        >>> bool(torch.allclose(step["1.weight"][0], torch.ones(4, 2) @ torch.linalg.inv(v @ v.T), rtol=1e-4))
        True

    Source: Tong, Ma and Chi, JMLR 2021 (arXiv 2005.08898), for descent; "LoRA-Muon" (arXiv 2606.12921), for the polar
    factor.
    """
    found: dict[str, Tensor] = {}
    for numbers in stacks_of(pairs, parameters):
        for turned in (False, True):
            own = [number for number in numbers if (swapped is not None and swapped[number]) == turned]
            own = [number for number in own if any(_present(pairs[number], side, covectors) for side in SIDES)]
            if not own:
                continue
            roots = roots_of(pairs, own, parameters, floors, kind, turned)
            for side, gauge in zip(SIDES, (roots.outgoing, roots.incoming), strict=True):
                _step_side(direction, pairs, own, side, gauge, covectors, squares, sketches, found)
    return found


def _present(pair: FactorPair, side: FactorSide, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name in pair.names(side) if name in tensors)


def _step_side(
    direction: Direction,
    pairs: Sequence[FactorPair],
    numbers: Sequence[int],
    side: FactorSide,
    gauges: Tensor,
    covectors: Mapping[str, Tensor],
    squares: Mapping[tuple[int, FactorSide], Tensor] | None,
    sketches: Sketches | None,
    found: dict[str, Tensor],
) -> None:
    """Adds the directions of one side of pairs of one shape."""
    tasks = gauges.shape[0] // len(numbers)
    by_rows: dict[int, list[tuple[int, int, Tensor]]] = {}
    for place, number in enumerate(numbers):
        rows = rows_of(pairs[number], side, covectors)
        if rows is not None:
            by_rows.setdefault(rows.shape[1], []).append((place, number, rows))
    for several in by_rows.values():
        whole = len(several) == len(numbers)
        gauge = gauges if whole else torch.cat([gauges[place * tasks :][:tasks] for place, _, _ in several])
        seconds = None if squares is None else torch.cat([squares[number, side] for _, number, _ in several])
        stepped_numbers = [number for _, number, _ in several]
        sketch = None if sketches is None else sketches.brought_up(pairs, stepped_numbers, side, gauge)
        stepped = in_gauge(direction, torch.cat([rows for _, _, rows in several]), gauge, seconds, sketch)
        for (_, number, _), rows in zip(several, stepped.split(tasks), strict=True):
            start = 0
            for leg in pairs[number].legs(side):
                if leg.name not in covectors:
                    continue
                like = covectors[leg.name]
                count = like[0].numel() // like.shape[leg.axis + 1] * leg.places.shape[0]
                base = found.get(leg.name)
                base = torch.zeros_like(like) if base is None else base
                found[leg.name] = spread(leg, rows[:, start : start + count], base)
                start += count
