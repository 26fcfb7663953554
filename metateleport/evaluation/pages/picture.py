"""The picture of a checkpoint: medians at the marks, with a panel for each evaluation that has an attribution."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metateleport.evaluation.pages.entry import Entry
from metateleport.evaluation.pages.markdown import called
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.style import LINES, bare, colours_of, is_drawn, new_figure, save, trace_of

__all__ = ["draw"]

_MARKERS = {"teleport-off": "o", "random-teleport": "^", "step-only": "s"}
# Diverged losses are outside.
_SMALLEST, _LARGEST = 1e-40, 1e12


def draw(entries: Sequence[Entry], titles: Sequence[str], path: Path) -> bool:
    """Draws the medians at the marks, with bands that cover all meta-seeds.

    Args:
        entries: evaluations, one for each panel.
        titles: titles of the panels.
        path: the png file to write; a file with the same drawing is left as it is.

    Returns:
        Whether it was written.
    """
    trace = trace_of([[dict(entry.result), title] for entry, title in zip(entries, titles, strict=True)], draw)
    if is_drawn(path, trace):
        return False
    columns = 2 if len(entries) == 4 else min(3, len(entries))
    rows = math.ceil(len(entries) / columns)
    figure = new_figure(3.9 * columns + 2.2, 3.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(name for entry in entries for name in entry.methods))
    colours = colours_of(names)
    handles: dict[str, Any] = {}
    for axes, entry, title in zip(grid, entries, titles, strict=False):
        handles.update(_panel(axes, entry, title, colours))
    for axes in grid[len(entries) :]:
        axes.set_axis_off()
    moves_by = entries[0].moves_by
    figure.legend(
        [handles[name] for name in names],
        [called(name, moves_by).strip("*") for name in names],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    save(figure, path, 110, trace)
    return True


def _panel(axes: Any, entry: Entry, title: str, colours: dict[str, str]) -> dict[str, Any]:
    from matplotlib.ticker import NullLocator

    handles = {}
    # The learned method is drawn last, on top of the others.
    for name in sorted(entry.methods, key=lambda each: (each == REFERENCE, each.startswith(REFERENCE))):
        own = name == REFERENCE
        line = LINES.get(name.partition("/")[2], "-")
        medians = [_shown(entry.median(name, mark)) for mark in entry.marks]
        marker = _MARKERS.get(name.partition("/")[2], ".")
        width, size = (2.2, 6) if own else (1.3, 5)
        style = {"color": colours[name], "linestyle": line, "linewidth": width, "marker": marker, "markersize": size}
        (handles[name],) = axes.plot(entry.marks, medians, markerfacecolor="none" if marker != "." else None, **style)
        if own and entry.seeds:
            low, high = ([_shown(which(entry.of_seeds(name, mark))) for mark in entry.marks] for which in (min, max))
            axes.fill_between(entry.marks, low, high, color=colours[name], alpha=0.15, linewidth=0)
    below = min(entry.median(name, mark) for name in entry.methods for mark in entry.marks) <= 0
    axes.set(xscale="log", yscale="linear" if below else "log", ylabel=entry.measure, xlabel="gradient evaluations")
    axes.set_xticks(entry.marks, [str(mark) for mark in entry.marks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(textwrap.fill(title, 44), fontsize=8.5, loc="left")
    axes.tick_params(which="both", labelsize=8)
    bare(axes)
    return handles


def _shown(value: float) -> float:
    return float("nan") if abs(value) > _LARGEST else value if value <= 0 else max(value, _SMALLEST)
