"""An evaluation as a printed table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from metateleport.evaluation.marks import marks
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.words import interval, number
from metateleport.families import TRAINING_LOSS

__all__ = ["measured", "ratios_table_of", "table_of"]


def measured(report: Mapping[str, Any]) -> str:
    """Name of the measure in a report."""
    return str(report.get("measure", TRAINING_LOSS))


def table_of(report: Mapping[str, Any]) -> Table:
    """The main table of a report: a row for each method, and one for the worst of several meta-seeds.

    Args:
        report: the result of `report_of`, or of reading a file by `write_report`.

    Returns:
        The table: the median loss at the marks and at the end of the budget, the final loss's interquartile range, the
        number of diverged tasks, seconds, and the paired ratio to the learned method, above 1 if the latter is better.
    """
    methods: Mapping[str, Any] = report["methods"]
    steps, tasks = report["steps"], report["tasks"]
    places = marks(steps)
    compared = REFERENCE in methods and len(methods) > 1 and not report.get("below_zero")
    accurate = any("held_out_accuracy" in entry for entry in methods.values())
    table = Table(
        title=f"{report['task']['name']}: {measured(report)}, median of {tasks} held-out tasks by gradient evaluations",
        caption=f"{report['dtype']}, seed {report['seed']}; seconds are of all {tasks} tasks together"
        + (f", measured with {report['conditions']['jobs']} processes side by side" if _shared(report) else "")
        + ("" if all(entry.get("stacked", True) for entry in methods.values()) else "; *: one task after another")
        + (f"; ratio: paired median of final losses over {REFERENCE}'s" if compared else ""),
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
    if compared:
        table.add_column(f"ratio to {REFERENCE} [95 %]", justify="right", no_wrap=True)
    for name, entry in methods.items():
        row = [name, *(number(entry["median"][place]) for place in places)]
        row.append(f"{number(entry['q25'][-1])} .. {number(entry['q75'][-1])}")
        if accurate:
            accuracy = entry.get("held_out_accuracy")
            row.append(f"{accuracy['median'][-1]:.1%}" if accuracy else "")
        seconds = f"{entry['seconds']:.2f}" + ("" if entry.get("stacked", True) else "*")
        row += [str(sum(entry["diverged"])) if any(entry["diverged"]) else "-", seconds]
        if compared:
            pair = entry.get(f"paired_ratio_to_{REFERENCE}")
            row.append("" if pair is None else interval(pair))
        table.add_row(*row)
        if name == REFERENCE and report.get("meta_seeds"):
            worst, seeds = report["meta_seeds"]["worst"][name], report["meta_seeds"]["seeds"]
            medians = [number(worst["median_loss"][str(place)]) for place in places]
            empty = [""] * (1 + accurate)
            table.add_row(f"  worst of {len(seeds)} meta-seeds", *medians, *empty, str(worst["diverged"] or "-"), "")
    return table


def ratios_table_of(report: Mapping[str, Any]) -> Table | None:
    """The table of paired ratios to the learned method at every mark: above 1 the learned one is better.

    Args:
        report: the result of `report_of`, or of reading a file by `write_report`.

    Returns:
        The table, with a row for each other method; with several meta-seeds the ratio over all of them, and below it
        that of the worst. None if there is no learned method or no other one, or losses go below zero.
    """
    methods: Mapping[str, Any] = report["methods"]
    if REFERENCE not in methods or len(methods) < 2 or report.get("below_zero"):
        return None
    seeds = len(report["meta_seeds"]["seeds"]) if report.get("meta_seeds") else 1
    over = f"interquartile mean over {seeds} meta-seeds and all tasks; below it the worst meta-seed's median"
    table = Table(
        title=f"{measured(report)} over {REFERENCE}'s, by gradient evaluations [95 %]",
        caption=over if seeds > 1 else "paired medians over tasks",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for place in marks(report["steps"]):
        table.add_column(str(place), justify="right", no_wrap=True)
    for name, entry in methods.items():
        if name == REFERENCE:
            continue
        if seeds > 1:
            ratios = report["meta_seeds"]["ratios_to_learned"][name]
            table.add_row(name, *(f"{interval(each)}\n{interval(each['worst'])}" for each in ratios))
        else:
            table.add_row(name, *(interval(each) for each in entry[f"paired_ratios_to_{REFERENCE}"]))
    return table


def _shared(report: Mapping[str, Any]) -> bool:
    return int(report["conditions"].get("jobs", 1)) > 1
