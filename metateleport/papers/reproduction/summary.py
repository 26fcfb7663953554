"""Tables and sentences that sum up a reproduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from metateleport.evaluation import marks, words_of
from metateleport.evaluation.tuning import LARGEST

__all__ = ["sentences_of", "tables_of"]


def tables_of(result: Mapping[str, Any]) -> list[Table]:
    """For each network a table: a row for every meta-seed of every method, and gradient descent.

    Args:
        result: what `metateleport.papers.reproduction.figure_6` gave.

    Returns:
        The tables: median loss at the marks, and how many tasks diverged.
    """
    tables = []
    for name, report in result["networks"].items():
        places = marks(report["steps"])
        table = Table(title=f"{name}: training loss, median of {report['tasks']} held-out tasks", title_justify="left")
        table.add_column("method", no_wrap=True)
        table.add_column("meta-seed", justify="right")
        for place in places:
            table.add_column(str(place), justify="right", no_wrap=True)
        table.add_column("diverged", justify="right")
        gd = report["methods"]["gd"]
        table.add_row("gd", "", *(_number(gd["median"][place]) for place in places), str(sum(gd["diverged"])))
        for method in report["meta_seeds"]["worst"]:
            for each in report["meta_seeds"]["seeds"]:
                found = each["methods"][method]
                medians = (_number(found["median_loss"][str(place)]) for place in places)
                table.add_row(method, str(each["seed"]), *medians, str(found["diverged"]))
        tables.append(table)
    return tables


def sentences_of(result: Mapping[str, Any]) -> list[str]:
    """The findings: which meta-seeds collapsed, and the gain of each network's teleport.

    Args:
        result: what `metateleport.papers.reproduction.figure_6` gave.
    """
    sentences = []
    for name, report in result["networks"].items():
        lost, seeds = result["collapsed"][name], len(report["meta_seeds"]["seeds"])
        diverged = report["meta_seeds"]["worst"]["learned"]["diverged"]
        sentences.append(
            f"{name}: {len(lost)} of {seeds} meta-seeds end above gradient descent at {report['steps']} gradient "
            f"evaluations; {diverged} of {seeds * report['tasks']} runs diverged."
        )
        sentences += [f"{name}, {words}" for words in words_of(report)]
    return sentences


def _number(value: float) -> str:
    return "not finite" if abs(value) >= LARGEST else f"{value:.3g}"
