"""Shared by the commands: settings from the command line, one-line errors, and messages on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from metateleport.files import check_destination

__all__ = ["Parser", "UsageError", "check_files", "positive", "say", "settings_of"]


class UsageError(ValueError):
    """Something on the command line cannot work; the message says what to write instead."""


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, and with examples whose lines are not re-wrapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def settings_of(pairs: Sequence[str]) -> dict[str, str]:
    """Settings from `name=value` pairs.

    Raises:
        UsageError: if one has no `=`, or a name comes twice.

    Example:
        >>> settings_of(["width=40", "samples=all"])
        {'width': '40', 'samples': 'all'}
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"--set takes name=value, as in --set width=40; not {pair!r}")
        if name in settings:
            raise UsageError(f"--set gives {name} twice: {settings[name]!r} and {value!r}")
        settings[name] = value
    return settings


def check_files(*paths: Path | None) -> None:
    """Tries before any work whether files can be written; those that are None are left out.

    Raises:
        UsageError: if one is a folder.
        FileError: if there is no right or no space to write it.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{path} is a folder: give the name of a file to write")
        check_destination(path)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text) if text.strip().isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return number


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.strip().isdigit():
        raise argparse.ArgumentTypeError(f"a whole number of at least 0 is needed, not {text!r}")
    return int(text)


def say(message: str) -> None:
    """Prints a message on stderr; stdout is for output that other programs read."""
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(message, markup=False)
