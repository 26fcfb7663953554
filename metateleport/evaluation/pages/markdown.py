"""Building blocks of the pages in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.words import ABLATED, interval

__all__ = ["WRITTEN", "called", "changed", "listed", "ratio_cell", "table"]

WRITTEN = "<!-- Written by `metateleport report` from cards and evaluations: edits are lost when it writes again. -->"

_CALLED = {
    REFERENCE: "**learned**",
    f"{REFERENCE}/teleport-off": "its {part} off",
    f"{REFERENCE}/stays-off": "its teleport that stays off",
    f"{REFERENCE}/gauge-off": "its gauge off",
    f"{REFERENCE}/random-teleport": "random elements of the same size",
    f"{REFERENCE}/step-only": "the step learned alone",
}
PARTS = {"stays": "teleport", "undone": "gauges", "both": "teleport and gauges", "none": "teleport"}
"""The name in tables of what is switched off, by the values of `moves_by`."""


def called(method: str, moves_by: str) -> str:
    """The name of a method in the rows of tables.

    Args:
        method: name of the method.
        moves_by: how the learned method uses group elements.

    Example:
        >>> called("learned/teleport-off", "undone"), called("adam", "undone")
        ('its gauges off', 'adam')
    """
    if method.startswith(ABLATED):
        return f"without {method.removeprefix(ABLATED)}"
    return _CALLED.get(method, method).format(part=PARTS[moves_by])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column has text, the others numbers.

    Example:
        >>> table(["", "12"], [["adam", "0.5"]])
        ['| | 12 |', '|---|--:|', '| adam | 0.5 |', '']
    """
    return [_row(header), "|---|" + "--:|" * (len(header) - 1), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell.replace('|', '/')} " if cell else " " for cell in cells) + "|"


def ratio_cell(ratio: Mapping[str, float]) -> str:
    """A ratio with its interval, bold if the interval leaves out 1."""
    shown = interval(ratio)
    return f"**{shown}**" if ratio["low"] > 1 or ratio["high"] < 1 else shown


def listed(settings: Mapping[str, str]) -> str:
    """Settings as on the command line; empty for none."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def changed(settings: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The settings that differ from known ones.

    Example:
        >>> changed({"width": "40", "depth": "2"}, {"width": "20", "depth": "2"})
        {'width': '40'}
    """
    return {name: value for name, value in settings.items() if known.get(name) != value}
