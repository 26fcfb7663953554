"""The list of idioms, and what an idiom gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from .loops import Bench, Course
from .models import Problem

__all__ = ["IDIOMS", "Idiom", "Outcome", "apart", "idiom", "same"]

TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an idiom did.

    Args:
        tried: the run in the idiom.
        references: the same data in the reference idiom; the run has to be equal to one of them.
    """

    tried: Course
    references: tuple[Course, ...] = ()


@dataclasses.dataclass(frozen=True)
class Idiom:
    """A row of the table.

    Args:
        name: of the row.
        run: runs it.
        precision: whether it asks for a dtype, which a checkpoint may refuse.
        leaves_out: why it is not tried on a problem; None if it is.
    """

    name: str
    run: Callable[[Bench], Outcome]
    precision: bool
    leaves_out: Callable[[Problem], str | None] | None


IDIOMS: dict[str, Idiom] = {}
"""The rows of the table, in its order."""


def idiom(
    name: str, *, precision: bool = False, leaves_out: Callable[[Problem], str | None] | None = None
) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    """Enters a function into the table; it returns an `Outcome`, and asserts what cannot be told from one."""

    def enter(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        IDIOMS[name] = Idiom(name, run, precision, leaves_out)
        return run

    return enter


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, against the size of what is compared."""
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.numel():
            largest = max(largest, float((one - other).detach().abs().max() / (1 + other.detach().abs().max())))
    return largest


def same(ours: list[Tensor], theirs: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Asserts that tensors are equal.

    Raises:
        AssertionError: if they are not.
    """
    difference = apart(ours, theirs)
    assert difference <= tolerance, f"{what}: {difference:.1e} apart"
