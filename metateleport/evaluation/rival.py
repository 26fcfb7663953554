"""A rival: a method that a learned optimizer is compared with, and the grid that it is tuned on."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metateleport.evaluation.trajectory import Method
from metateleport.symmetries import Symmetry

__all__ = ["Choice", "Lattice", "Rival"]


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The values `10^(j/4)` of a positive setting, unbounded on both sides.

    Args:
        low: first power of ten in the coarse scan.
        high: last power of ten in the coarse scan.

    Example:
        >>> Lattice(-1, 1).coarse()
        [-4, 0, 4]
        >>> Lattice(-1, 1).value(-2)
        0.316228
    """

    low: int
    high: int

    def coarse(self) -> list[int]:
        """Indices of the coarse scan: whole powers of ten."""
        return list(range(4 * self.low, 4 * self.high + 1, 4))

    def value(self, index: int) -> float:
        """The value at an index, to six digits, so that what is printed is what was run."""
        return float(f"{10 ** (index / 4):.6g}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting with a few allowed values; the search starts with the first."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Rival:
    """A method that a learned optimizer is compared with, and the grid that it is tuned on.

    Args:
        name: name of the method.
        make: makes the method, called with a step size and the values of the choices.
        step_size: the grid of the step size, passed as `lr`.
        choices: further settings by name; each value is compared at its own best step size.
        tasks: number of training tasks to tune on.
        on_request: whether it runs only if it is asked for by name, because it takes long.
        library: a library that it imports and that may not be installed; empty if there is none.
        extra: the extra of this package that brings the library.
        fair: whether it is among those that run under fair rules if no names are given.
        needs: the kind of symmetry that a task has to have for it, as `LoRA pair`; empty for none.

    Example:
        >>> from metateleport.evaluation import FirstOrder
        >>> Rival("gd", lambda **settings: FirstOrder("gd", **settings)).make(lr=0.1).settings
        {'lr': 0.1}
    """

    name: str
    make: Callable[..., Method]
    step_size: Lattice = dataclasses.field(default_factory=lambda: Lattice(-6, 1))
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    tasks: int = 16
    on_request: bool = False
    library: str = ""
    extra: str = ""
    fair: bool = False
    needs: str = ""

    def missing(self) -> str:
        """A sentence that says what to install; empty if nothing is missing."""
        if not self.library or importlib.util.find_spec(self.library) is not None:
            return ""
        return f"{self.name} needs {self.library}: pip install 'metateleport[{self.extra}]'"

    def suits(self, symmetries: Sequence[Symmetry]) -> bool:
        """Whether tasks with these symmetries have the kind that it needs."""
        return not self.needs or any(symmetry.kind == self.needs for symmetry in symmetries)

    def grid(self) -> str:
        """The grid and the search, in words."""
        words = (
            f"lr: 10^(j/4), scanned by whole powers of ten from 1e{self.step_size.low} to 1e{self.step_size.high}, "
            "then at both neighbours of the best two and one places away until both are worse, past the ends too"
        )
        for name, choice in self.choices.items():
            words += f"; {name}: one of {', '.join(map(str, choice.values))}"
        if self.choices:
            words += "; the choices one after the other, each at its own best lr, until none changes"
        return words
