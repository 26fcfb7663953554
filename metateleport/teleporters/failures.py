"""The three ways in which a teleport fails, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["FAILURES", "NO_GAIN", "UNSTABLE", "WORSE_HELD_OUT", "add_failure", "held_out_failure"]

NO_GAIN = "no gain"
WORSE_HELD_OUT = "worse held-out loss"
UNSTABLE = "unstable element"

FAILURES = (NO_GAIN, WORSE_HELD_OUT, UNSTABLE)
"""Names of failures in reports. No gain: the objective did not grow, or the loss fell no faster after the teleport than
before. Worse held-out loss: the loss on held-out data rose. Unstable element: it was refused (not finite, too large,
ill-conditioned, or with a drift above the bound), or was applied and cost more than half of the outputs' digits."""

# A held-out loss that rises by less is taken for rounding and for the drift that the report tells.
_MARGIN = 1e-3


def add_failure(failures: Mapping[str, str], name: str, seen: str) -> dict[str, str]:
    """Failures with one observation added, after earlier ones of the same name.

    Args:
        failures: by name, what was seen.
        name: one of `FAILURES`.
        seen: in words; with none there is no failure.

    Example:
        >>> add_failure({"no gain": "the gradient norm fell"}, "no gain", "so did the loss, no faster")
        {'no gain': 'the gradient norm fell; so did the loss, no faster'}
    """
    if not seen:
        return dict(failures)
    return {**failures, name: "; ".join(each for each in (failures.get(name), seen) if each)}


def held_out_failure(before: float, after: float, when: str) -> str:
    """Says that a held-out loss has risen; empty if it has not, or there was none before.

    Args:
        before: the loss before the teleport; NaN where there is none.
        after: the loss afterwards.
        when: that was, in words.

    Example:
        >>> held_out_failure(1.0, 1.5, "right after it")
        '1.5 right after it, 1 before'
        >>> held_out_failure(1.0, 1.0001, "right after it")
        ''
    """
    if math.isnan(before) or after <= before + _MARGIN * abs(before):
        return ""
    return f"{after:.3g} {when}, {before:.3g} before"
