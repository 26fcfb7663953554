"""Formulas as MathML, which browsers draw themselves: no script, nothing fetched."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

__all__ = ["UnknownFormula", "formulas_as_mathml"]

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


class UnknownFormula(ValueError):
    """A formula has a command that cannot be shown."""


def formulas_as_mathml(page: str) -> str:
    r"""A page's HTML with the formulas of `pymdownx.arithmatex` turned into MathML.

    Raises:
        UnknownFormula: if a formula has a command that is not known.

    Example:
        >>> "<mi>g</mi>" in formulas_as_mathml(r'<span class="arithmatex">\(g\)</span>')
        True
    """
    page = _DISPLAY.sub(lambda found: _converted(found[1], "block"), page)
    return _INLINE.sub(lambda found: _converted(found[1], "inline"), page)


def _converted(formula: str, display: str) -> str:
    source = html.unescape(formula).strip()
    try:
        mathml: str = convert(source, display=display)
    except Exception as error:
        raise UnknownFormula(f"the formula {source!r} cannot be shown: {type(error).__name__}: {error}") from error
    # What the converter does not know it leaves as text.
    unknown = re.search(r"\\[A-Za-z]+", re.sub(r"<annotation.*?</annotation>", "", mathml, flags=re.DOTALL))
    if unknown:
        raise UnknownFormula(f"the formula {source!r} has {unknown[0]}, which cannot be shown")
    return mathml
