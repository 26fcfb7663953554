"""Checks of plain values against a schema: types, ranges and sizes, with the field's name in every error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from metateleport.settings import nearest, shown

__all__ = ["Check", "FieldError", "flag", "items", "number", "one_of", "optional", "plain", "table", "text", "whole"]

Check = Callable[[Any, str], None]
"""Raises a `FieldError` if a value, the first argument, is not allowed in the field that the second one names."""

_DEEPEST = 12
_LONGEST = 100_000


class FieldError(ValueError):
    """A field is missing, unknown, of another type or out of its range; the message begins with its dotted name."""


def text(longest: int = _LONGEST, pattern: str | None = None) -> Check:
    """A text of at most so many characters; with a pattern, one that the whole of it matches."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str):
            raise FieldError(f"{key} is a text, not {shown(value)}")
        if len(value) > longest:
            raise FieldError(f"{key} is a text of at most {longest} characters, and this one has {len(value)}")
        if pattern is not None and re.fullmatch(pattern, value) is None:
            raise FieldError(f"{key} is {shown(value)}, which does not have the form {pattern}")

    return check


def one_of(*allowed: str) -> Check:
    """One of these texts."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise FieldError(f"{key} is one of {', '.join(allowed)}; not {shown(value)}")

    return check


def flag(value: Any, key: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise FieldError(f"{key} is true or false, not {shown(value)}")


def whole(least: int = 0, most: int = 2**63 - 1) -> Check:
    """A whole number from `least` to `most`.

    Example:
        >>> whole(1)(0, "results.tasks")
        Traceback (most recent call last):
        metateleport.checkpoint.schema.FieldError: results.tasks is a whole number from 1 to 9223372036854775807, not 0
    """

    def check(value: Any, key: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise FieldError(f"{key} is a whole number from {least} to {most}, not {shown(value)}")

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """A finite number from `least` to `most`."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not _finite(value):
            raise FieldError(f"{key} is a finite number, not {shown(value)}")
        if not least <= value <= most:
            raise FieldError(f"{key} is a number from {least:g} to {most:g}, not {shown(value)}")

    return check


def items(each: Check, most: int, exactly: int | None = None) -> Check:
    """A list of at most so many values, or of exactly so many."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, list):
            raise FieldError(f"{key} is a list, not {shown(value)}")
        if len(value) > most or (exactly is not None and len(value) != exactly):
            wanted = f"exactly {exactly}" if exactly is not None else f"at most {most}"
            raise FieldError(f"{key} is a list of {wanted} values, and this one has {len(value)}")
        for place, one in enumerate(value):
            each(one, f"{key}[{place}]")

    return check


def table(
    fields: Mapping[str, Check] | Check, required: tuple[str, ...] = (), most: int = 1000, others: Check | None = None
) -> Check:
    """A table with these fields; with one check for all of them, a table of any names.

    Args:
        fields: the check of every field that there may be, or that of all.
        required: names of the fields that there have to be.
        most: the largest number of fields.
        others: the check of fields of other names; without one they are refused.

    Example:
        >>> table({"tasks": whole(1)}, ("tasks",))({"taks": 3}, "results")
        Traceback (most recent call last):
        metateleport.checkpoint.schema.FieldError: results.taks is not known: the nearest is results.tasks
    """

    def check(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{key or 'the card'} is a table, not {shown(value)}")
        if len(value) > most:
            raise FieldError(f"{key} is a table of at most {most} entries, and this one has {len(value)}")
        inside = f"{key}." if key else ""
        for name, each in value.items():
            if not isinstance(name, str) or len(name) > 1000:
                raise FieldError(f"{key} has an entry whose name is {shown(name)}: a text of at most 1000 characters")
            if not isinstance(fields, Mapping):
                fields(each, inside + name)
            elif name in fields:
                fields[name](each, inside + name)
            elif others is not None:
                others(each, inside + name)
            else:
                near = nearest(name, fields)
                raise FieldError(f"{inside}{shown(name)[1:-1]} is not known: the nearest is {inside}{near}")
        for name in required:
            if name not in value:
                raise FieldError(f"{inside}{name} is missing")

    return check


def optional(check: Check) -> Check:
    """What the check allows, or null."""

    def either(value: Any, key: str) -> None:
        if value is not None:
            check(value, key)

    return either


def plain(value: Any, key: str) -> None:
    """Whatever JSON has, as long as its numbers are finite and it is not nested too deep."""
    _plain(value, key, _DEEPEST)


def _plain(value: Any, key: str, deepest: int) -> None:
    if deepest < 0:
        raise FieldError(f"{key} is nested too deep")
    if isinstance(value, dict):
        table(lambda each, name: _plain(each, name, deepest - 1), most=10_000)(value, key)
    elif isinstance(value, list):
        items(lambda each, name: _plain(each, name, deepest - 1), most=1_000_000)(value, key)
    elif isinstance(value, str):
        text()(value, key)
    elif value is not None and not isinstance(value, bool):
        number()(value, key)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
