"""Who fetches a checkpoint that has an address elsewhere, as `models:/lora@champion`.

A room that knows how to fetch is told of here by the package's face, so that loading depends on no such room, and
imports one only for an address of its scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["fetcher_of", "register_source"]

Fetcher = Callable[[str], Path]

_FETCHERS: dict[str, Fetcher] = {}


def register_source(scheme: str, fetch: Fetcher) -> None:
    """Makes a scheme of addresses known.

    Args:
        scheme: what addresses begin with, without the colon.
        fetch: maps an address to the folder of the checkpoint, which it has downloaded; where it cannot, it raises
            an error that says what to do.
    """
    _FETCHERS[scheme] = fetch


def fetcher_of(address: str) -> Fetcher | None:
    """Who fetches an address; None for a name or a path.

    Example:
        >>> fetcher_of("digits") is None, fetcher_of("runs/mine") is None, fetcher_of("models:/lora/3") is None
        (True, True, False)
    """
    scheme, colon, rest = address.partition(":")
    return _FETCHERS.get(scheme) if colon and rest.startswith("/") else None
