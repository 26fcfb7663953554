"""An evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from metateleport.evaluation.attribution import marks
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.tuning import LARGEST
from metateleport.families import TRAINING_LOSS

__all__ = ["measured", "table_of"]


def measured(report: Mapping[str, Any]) -> str:
    """What a report's lists hold, as people call it."""
    return str(report.get("measure", TRAINING_LOSS))


def table_of(report: Mapping[str, Any]) -> Table:
    """A table of a report: a row for each method.

    Args:
        report: what `report_of` gave, or a file written by `write_report`.

    Returns:
        The table: median loss after a tenth, a third and all of the budget, the last one's interquartile range, how
        many tasks diverged, seconds, and the paired ratio to the learned method, above 1 where that one is better.
    """
    methods: Mapping[str, Any] = report["methods"]
    steps, tasks = report["steps"], report["tasks"]
    places = marks(steps)
    accurate = any("held_out_accuracy" in entry for entry in methods.values())
    table = Table(
        title=f"{report['task']['name']}: {measured(report)}, median of {tasks} held-out tasks by gradient evaluations",
        caption=f"{report['dtype']}, seed {report['seed']}; seconds are of all {tasks} tasks together"
        + (f"; ratio: paired median of final losses over {REFERENCE}'s" if REFERENCE in methods else ""),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for place in places:
        table.add_column(str(place), justify="right", no_wrap=True)
    table.add_column("quartiles", justify="right", no_wrap=True)
    if accurate:
        table.add_column("held-out accuracy", justify="right")
    table.add_column("diverged", justify="right")
    table.add_column("seconds", justify="right")
    if REFERENCE in methods:
        table.add_column(f"ratio to {REFERENCE} [95 %]", justify="right", no_wrap=True)
    for name, entry in methods.items():
        row = [name, *(_number(entry["median"][place]) for place in places)]
        row.append(f"{_number(entry['q25'][-1])} .. {_number(entry['q75'][-1])}")
        if accurate:
            accuracy = entry.get("held_out_accuracy")
            row.append(f"{accuracy['median'][-1]:.1%}" if accuracy else "")
        row += [str(sum(entry["diverged"])) if any(entry["diverged"]) else "-", f"{entry['seconds']:.2f}"]
        if REFERENCE in methods:
            pair = entry.get(f"paired_ratio_to_{REFERENCE}")
            row.append(
                "" if pair is None else "{} [{}, {}]".format(*(_number(pair[k]) for k in ("ratio", "low", "high")))
            )
        table.add_row(*row)
    return table


def _number(value: float) -> str:
    return "not finite" if abs(value) >= LARGEST else f"{value:.3g}"
