"""Which process a message is from."""

from __future__ import annotations

import os

__all__ = ["who"]


def who() -> str:
    """What messages begin with; of several processes all but the first say which one they are.

    Example:
        >>> who()
        'metateleport'
    """
    rank = os.environ.get("RANK", "0")
    return "metateleport" if rank == "0" else f"metateleport, rank {rank}"
