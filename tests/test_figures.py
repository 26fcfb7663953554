"""Figures in prose: pages written by hand have none of their own, or quote those of a page that a command wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = re.compile(
    r"writes this page|<!-- Written by python -m [\w.]+|Made by `python|"
    r"by `python -m benchmarks\.[^`]*--markdown docs/"
)
"""What a page says that a command wrote."""
QUOTING = {"experiments.md", "figure_6.md"}
"""Pages that quote figures of such pages."""
FIGURE = re.compile(r"(?<![\w./])-?\d+(?:\.\d+)?e[-+]?\d+(?!\w)|(?<![\w./])-?\d+\.\d+(?![\w.])")
"""A decimal number; whole ones are mostly settings, years and counts."""
NO_FIGURE = re.compile(r"Python \d+\.\d+|version \d+\.\d+|arXiv \d+\.\d+")


def prose_of(text: str) -> str:
    """A page without code, mathematics, links' targets, versions, and what a command writes into it."""
    text = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", text, flags=re.DOTALL)
    return NO_FIGURE.sub("", re.sub(r"\]\([^)]*\)", "]", text))


def figures_in(text: str) -> list[str]:
    return FIGURE.findall(prose_of(text))


def quotes(figure: str, page: str) -> bool:
    """Whether some number of a page rounds to a figure, at the figure's precision."""
    mantissa, _, exponent = figure.partition("e")
    digits = len(mantissa.partition(".")[2])
    kind = "e" if exponent else "f"
    return any(
        f"{value:.{digits}{kind}}" == f"{float(figure):.{digits}{kind}}" for value in map(float, FIGURE.findall(page))
    )


HAND_WRITTEN = sorted(
    path for path in [*DOCS.glob("*.md"), *ROOT.glob("*.md")] if not WRITTEN.search(path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("page", [each for each in HAND_WRITTEN if each.name not in QUOTING], ids=lambda p: p.name)
def test_a_page_written_by_hand_has_no_figures(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("a changelog tells what was, with its figures")
    assert figures_in(page.read_text(encoding="utf-8")) == []


def test_the_page_of_the_experiments_quotes_what_they_wrote() -> None:
    sections = re.split(r"^## `", (DOCS / "experiments.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(sections) > 6
    strange = {}
    for section in sections[1:]:
        name = section.partition("`")[0]
        written = (DOCS / "experiments" / f"{name}.md").read_text(encoding="utf-8")
        strange[name] = [figure for figure in figures_in(section) if not quotes(figure, written)]
    assert {name: found for name, found in strange.items() if found} == {}


def test_the_page_of_figure_6_quotes_its_tables() -> None:
    written = (DOCS / "figure_6_tables.md").read_text(encoding="utf-8")
    figures = figures_in((DOCS / "figure_6.md").read_text(encoding="utf-8"))
    assert figures
    assert [figure for figure in figures if not quotes(figure, written)] == []


@pytest.mark.parametrize(
    ("figure", "page", "is_quoted"),
    [
        ("4.6", "4.58 [2.51, 6.93]", True),
        ("4e-5", "4.08e-05", True),
        ("-0.5", "-0.49", True),
        ("4.7", "4.58", False),
        ("3e-5", "4.08e-05", False),
    ],
)
def test_a_figure_is_quoted_if_it_rounds_to_what_was_written(figure: str, page: str, is_quoted: bool) -> None:
    assert quotes(figure, page) == is_quoted


def test_code_links_and_versions_have_no_figures() -> None:
    assert figures_in("by 1.5 in `x=1.5`, [a](b-1.5.md)\n```\n1.5\n```\nPython 3.10") == ["1.5"]
