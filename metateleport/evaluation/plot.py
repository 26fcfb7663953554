"""The plot of an evaluation: loss by gradient evaluations, and by seconds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.style import LINES, bare, colours_of, new_figure, save, suptitle
from metateleport.evaluation.table import measured
from metateleport.evaluation.tuning import LARGEST
from metateleport.evaluation.words import ABLATED

__all__ = ["plot"]


def plot(report: Mapping[str, Any], path: str | Path, trace: str = "") -> None:
    """Draws the median of every method with its interquartile band, by gradient evaluations and by seconds.

    With several meta-seeds the band of a learned method covers the medians of all of them.

    Args:
        report: the result of `report_of`, or of reading a file by `write_report`.
        path: the file to write; its suffix gives the format (png, svg, pdf).
        trace: as in `metateleport.evaluation.style.save`.

    Raises:
        ValueError: if matplotlib does not write the suffix's format.
    """
    # Runs without a part of the basis would hide the others; the tables have them.
    methods = {name: entry for name, entry in report["methods"].items() if not name.startswith(ABLATED)}
    figure = new_figure(11.5, 4.8)
    by_evaluations, by_seconds = figure.subplots(1, 2, sharey=True)
    low, high = _limits(methods)
    colours = colours_of(methods)
    # The learned method is drawn last, on top of the others.
    for name in sorted(methods, key=lambda each: (each == "learned", each.startswith("learned"))):
        entry = methods[name]
        median, q25, q75 = (np.clip(np.asarray(entry[key]), low, high) for key in ("median", "q25", "q75"))
        style: dict[str, Any] = {
            "color": colours[name],
            "linestyle": LINES.get(name.partition("/")[2], "-"),
            "linewidth": 2.4 if name == "learned" else 1.5,
        }
        seeds = report["meta_seeds"]["along"].get(name) if report.get("meta_seeds") else None
        band = (seeds["lowest"], seeds["highest"]) if seeds else (q25, q75)
        lowest, highest = (np.clip(np.asarray(each), low, high) for each in band)
        for axes, key in ((by_evaluations, "gradient_evaluations"), (by_seconds, "seconds_along")):
            axes.plot(entry[key], median, label=name, **style)
            axes.fill_between(entry[key], lowest, highest, color=colours[name], alpha=0.13, linewidth=0)
    by_evaluations.set(yscale="linear" if low < 0 else "log", ylim=(low, high), xlim=(0, report["steps"]))
    by_evaluations.set(xlabel="gradient evaluations", ylabel=measured(report))
    longest = max(max(entry["seconds_along"]) for entry in methods.values())
    shortest = min(min((s for s in entry["seconds_along"] if s > 0), default=longest) for entry in methods.values())
    if longest > 0:
        by_seconds.set(xscale="log", xlim=(shortest, longest))
    by_seconds.set(xlabel=f"seconds, all {report['tasks']} tasks together ({report['conditions']['device']})")
    for axes in (by_evaluations, by_seconds):
        bare(axes)
    handles, labels = by_evaluations.get_legend_handles_labels()
    order = [labels.index(name) for name in methods]
    figure.legend(
        [handles[each] for each in order], [labels[each] for each in order], loc="outside right upper", frameon=False
    )
    settings = ", ".join(f"{name}={value}" for name, value in report["task"]["settings"].items())
    # The legend is beside the title.
    heading = textwrap.fill(f"{report['task']['name']} ({settings})", 110)
    of_seeds = f"; learned: band of {len(report['meta_seeds']['seeds'])} meta-seeds" if report.get("meta_seeds") else ""
    suptitle(
        figure,
        f"{heading}\n"
        f"median and quartiles of {report['tasks']} held-out tasks{of_seeds}, {report['dtype']}, seed {report['seed']}",
    )
    save(figure, path, trace=trace)


def _limits(methods: Mapping[str, Any]) -> tuple[float, float]:
    """Limits of the loss's axis; diverged losses and exact zeros are outside."""
    start = max(float(entry["q75"][0]) for entry in methods.values())
    values: list[npt.NDArray[np.float64]] = [
        np.asarray(entry[key]) for entry in methods.values() for key in ("q25", "median")
    ]
    together = np.concatenate(values)
    if bool((together < 0).any()):
        # A logarithmic axis cannot show them.
        shown = together[(together > -LARGEST) & (together <= start)]
        room = 0.05 * (start - float(shown.min())) + 1e-12
        return float(shown.min()) - room, start + room
    shown = together[(together > 0) & (together <= 10 * start)]
    lowest = float(shown.min()) if shown.size else start * 1e-3
    return max(lowest / 2, start * 1e-40, 1e-300), max(3 * start, 1e-290)
