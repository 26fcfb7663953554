"""Covering designs: far fewer combinations than the product, in which every pair of values still meets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["pairwise"]


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A pairwise covering array: for any two factors each value of one meets each value of the other in some row.

    Built greedily, row by row: a row begins with a pair that has not met, of the two factors with the most such pairs,
    and takes for each other factor the value that brings the most new pairs. With two factors it is the product; with
    more it is little longer than the product of the two largest, whatever the others are.

    Args:
        factors: the values of each; they are told apart by their places, and need not be hashable.

    Returns:
        The rows, each with one value of every factor, in an order that depends on the arguments alone.

    Raises:
        ValueError: if there are fewer than two factors, or one has no value.

    Example:
        >>> len(pairwise("abcd", "xyz", (0, 1)))
        12
    """
    if len(factors) < 2:
        raise ValueError(f"a pair takes two factors: there are {len(factors)}")
    for place, values in enumerate(factors):
        if not values:
            raise ValueError(f"factor {place} has no value")
    sizes = [len(values) for values in factors]
    open_pairs = {
        (one, other): dict.fromkeys(itertools.product(range(sizes[one]), range(sizes[other])))
        for one, other in itertools.combinations(range(len(factors)), 2)
    }
    uses = [[0] * size for size in sizes]
    rows = []
    while any(open_pairs.values()):
        row = _row(open_pairs, uses)
        for (one, other), pairs in open_pairs.items():
            pairs.pop((row[one], row[other]), None)
        for place, value in enumerate(row):
            uses[place][value] += 1
        rows.append(tuple(values[chosen] for values, chosen in zip(factors, row, strict=True)))
    return rows


def _row(open_pairs: dict[tuple[int, int], dict[tuple[int, int], None]], uses: list[list[int]]) -> list[int]:
    """The next row, as the places of its values; between values that bring equally much the least used one."""
    first = max(open_pairs, key=lambda pair: len(open_pairs[pair]))
    row = dict(zip(first, next(iter(open_pairs[first])), strict=True))
    for place in range(len(uses)):
        if place in row:
            continue

        def worth(value: int, place: int = place) -> tuple[int, int]:
            met = sum(
                ((value, at) if place < other else (at, value)) in open_pairs[min(place, other), max(place, other)]
                for other, at in row.items()
            )
            return met, -uses[place][value]

        row[place] = max(range(len(uses[place])), key=worth)
    return [row[place] for place in range(len(uses))]
