"""Tables and sentences that sum up a reproduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from metateleport.evaluation import marks, words_of
from metateleport.evaluation.pages.markdown import table as table_of
from metateleport.evaluation.tuning import LARGEST

__all__ = ["page_of", "sentences_of", "tables_of"]


def tables_of(result: Mapping[str, Any]) -> list[Table]:
    """For each network a table: a row for every meta-seed of every method, and gradient descent.

    Args:
        result: what `metateleport.papers.reproduction.figure_6` gave.

    Returns:
        The tables: median loss at the marks, and how many tasks diverged.
    """
    tables = []
    for name, report in result["networks"].items():
        table = Table(title=_title(name, report), title_justify="left")
        header, *rows = _cells(report)
        for title in header:
            table.add_column(title, justify="left" if title == header[0] else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def page_of(result: Mapping[str, Any], title: str) -> str:
    """The tables and findings as a page in Markdown.

    Args:
        result: what `metateleport.papers.reproduction.figure_6` gave.
        title: of the page.
    """
    lines = [f"# {title}", "", "`metateleport reproduce figure-6 --page FILE` writes this page.", ""]
    for name, report in result["networks"].items():
        header, *rows = _cells(report)
        lines += [f"{_title(name, report)}:", "", *table_of(header, rows)]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences_of(result)), ""])


def _title(name: str, report: Mapping[str, Any]) -> str:
    return f"{name}: training loss, median of {report['tasks']} held-out tasks"


def _cells(report: Mapping[str, Any]) -> list[list[str]]:
    places, gd = marks(report["steps"]), report["methods"]["gd"]
    cells = [
        ["method", "meta-seed", *map(str, places), "diverged"],
        ["gd", "", *(_number(gd["median"][place]) for place in places), str(sum(gd["diverged"]))],
    ]
    for method in report["meta_seeds"]["worst"]:
        for each in report["meta_seeds"]["seeds"]:
            found = each["methods"][method]
            medians = (_number(found["median_loss"][str(place)]) for place in places)
            cells.append([method, str(each["seed"]), *medians, str(found["diverged"])])
    return cells


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
