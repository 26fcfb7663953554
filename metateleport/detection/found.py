"""The symmetries found in a model, as a sequence, a table and JSON, and what was not claimed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, overload

from metateleport.symmetries import Symmetry

__all__ = ["Refused", "Symmetries"]

SCHEMA = "metateleport.symmetries/1"


@dataclasses.dataclass(frozen=True)
class Refused:
    """Something that was considered and not claimed.

    Args:
        reason: why.
        parameters: names of the parameters concerned.
        module: path of the module concerned; empty for the model itself.

    Example:
        >>> Refused("tanh is not followed", ("0.weight", "0.bias"), "1").module
        '1'
    """

    reason: str
    parameters: tuple[str, ...] = ()
    module: str = ""


class Symmetries(Sequence[Symmetry]):
    """The certified symmetries of a model, in the order of the data flow; printing it gives a table.

    Args:
        symmetries: what was found.
        refused: what was considered and not claimed.

    Example:
        >>> found = Symmetries([], [Refused("tanh is not followed", ("0.weight",), "1")])
        >>> len(found), found.dimension
        (0, 0)
    """

    def __init__(self, symmetries: Iterable[Symmetry], refused: Iterable[Refused] = ()) -> None:
        self._symmetries = tuple(symmetries)
        self.refused = tuple(refused)

    def __len__(self) -> int:
        return len(self._symmetries)

    @overload
    def __getitem__(self, index: int) -> Symmetry: ...
    @overload
    def __getitem__(self, index: slice) -> Symmetries: ...
    def __getitem__(self, index: int | slice) -> Symmetry | Symmetries:
        if isinstance(index, slice):
            return Symmetries(self._symmetries[index], self.refused)
        return self._symmetries[index]

    @property
    def exact(self) -> Symmetries:
        """Those that hold for all inputs."""
        return Symmetries([each for each in self if each.exactness == "exact"], self.refused)

    @property
    def dimension(self) -> int:
        """Sum of the dimensions of all groups."""
        return sum(symmetry.dimension for symmetry in self)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """How many symmetries there are of each kind, and their dimensions together."""
        counts: dict[str, tuple[int, int]] = {}
        for symmetry in self:
            count, dimension = counts.get(symmetry.kind, (0, 0))
            counts[symmetry.kind] = (count + 1, dimension + symmetry.dimension)
        return counts

    def as_dict(self) -> dict[str, Any]:
        """What `metateleport symmetries --json` writes."""
        return {
            "schema": SCHEMA,
            "symmetries": [
                {
                    "kind": each.kind,
                    "group": repr(each.group),
                    "dimension": each.dimension,
                    "exactness": each.exactness,
                    "parameters": list(each.parameters),
                    "buffers": list(each.buffers),
                    "drift": each.drift,
                }
                for each in self
            ],
            "refused": [
                {"parameters": list(each.parameters), "module": each.module, "reason": each.reason}
                for each in self.refused
            ],
        }

    def to_json(self) -> str:
        """`as_dict` as text; a drift that was not measured is null."""
        data = self.as_dict()
        for each in data["symmetries"]:
            if not math.isfinite(each["drift"]):
                each["drift"] = None
        return json.dumps(data, indent=2)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._symmetries)!r})"

    def __str__(self) -> str:
        rows = [("parameters", "kind", "group", "dimension", "exactness", "drift")]
        for each in self:
            row = (_short(each.where.split(", ")), each.kind, repr(each.group), str(each.dimension), each.exactness)
            rows.append((*row, f"{each.drift:.1e}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"{len(self)} symmetries of {self.dimension} dimensions in all")
        if self.refused:
            lines.append("")
            lines.append(f"not claimed ({len(self.refused)}):")
            for refused in self.refused:
                where = f"{refused.module}: " if refused.module else ""
                names = f" [{_short(refused.parameters)}]" if refused.parameters else ""
                lines.append(f"  {where}{refused.reason}{names}")
        return "\n".join(lines)


def _short(names: Sequence[str], most: int = 4) -> str:
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
