"""Sentences on the ratios of losses: whether a teleport helps, and which rivals the learned method is ahead of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.tuning import LARGEST

__all__ = [
    "ABLATED",
    "AGAINST",
    "DECIDES",
    "KINDS",
    "ahead_or_behind",
    "in_words",
    "interval",
    "left_out",
    "number",
    "opening_of",
    "over_seeds",
    "verdict_of",
]

AGAINST: dict[str, str] = {
    f"{REFERENCE}/teleport-off": "the same networks with the teleport off",
    f"{REFERENCE}/stays-off": "the same networks without the teleport that stays",
    f"{REFERENCE}/gauge-off": "the same networks without the gauge",
    f"{REFERENCE}/random-teleport": "a random element of the same size",
    f"{REFERENCE}/step-only": "a step learned without a teleport",
    f"{REFERENCE}/guarded": "the same networks with steps that do harm taken back",
    "whitening": "whitening by hand",
    "gradient-ascent": "gradient ascent",
}
"""Methods of the attribution, and their names in sentences."""

ABLATED = f"{REFERENCE}/without "
"""Prefix of the names of runs that leave out a part of the basis."""

_WITHOUT = (f"{REFERENCE}/teleport-off", f"{REFERENCE}/step-only")
_RANDOM = f"{REFERENCE}/random-teleport"

DECIDES = (*_WITHOUT, _RANDOM)
"""The runs that the learned method has to be ahead of for the verdict `helps`."""

KINDS = {
    "stays": "a teleport that stays: it moves the model along its orbit",
    "undone": "a gauge undone after the step: the model does not move along its orbit",
    "both": "a teleport that stays, and a gauge undone after the step",
}
"""How group elements are used, in words, by the values of `moves_by`."""


def verdict_of(moves_by: str, against: Mapping[str, Any], place: int = -1) -> str:
    """The verdict on a teleport: it helps if the learned method is ahead of all of `DECIDES`, by intervals without 1.

    Args:
        moves_by: `stays`, `undone`, `both` or `none`.
        against: by method the result of `metateleport.evaluation.compared.compared`.
        place: index of the mark; the last if not given.

    Returns:
        `helps`; `harms` if the learned method is behind one of them; `size` if it is ahead of all but random elements,
        which do as well; else `nothing`; `unknown` if none of them was run.
    """
    if moves_by == "none":
        return "nothing"
    ends = [_at(against[name], place) for name in DECIDES if name in against]
    if not ends:
        return "unknown"
    if all(end["low"] > 1 for end in ends):
        return "helps"
    if any(end["high"] < 1 for end in ends):
        return "harms"
    without = [_at(against[name], place) for name in _WITHOUT if name in against]
    return "size" if without and all(end["low"] > 1 for end in without) else "nothing"


def opening_of(moves_by: str, against: Mapping[str, Any], place: int = -1) -> str:
    """The verdict as a clause; if the teleport helps, with the smallest of the ratios that decide.

    Where random elements do as well it is the smallest of the ratios to runs without any.

    Args:
        moves_by: as in `verdict_of`; the verdict must not be `unknown`.
        against: as in `verdict_of`.
        place: index of the mark.

    Example:
        >>> end = {"at": 30, "ratio": 2.0, "low": 1.5, "high": 2.5}
        >>> opening_of("stays", {"learned/step-only": {"gradient_evaluations": [end]}})
        'the teleport divides the loss by 2 [1.5, 2.5]'
        >>> same = {"at": 30, "ratio": 1.0, "low": 0.9, "high": 1.1}
        >>> both = {"learned/teleport-off": end, "learned/random-teleport": same}
        >>> opening_of("undone", {name: {"gradient_evaluations": [each]} for name, each in both.items()})
        'the teleport divides the loss by 2 [1.5, 2.5] over none at all, as random elements of the same size do'
    """

    def least(names: Sequence[str]) -> str:
        ends = [_at(against[name], place) for name in names if name in against]
        return interval(min(ends, key=lambda end: end["ratio"]))

    return {
        "helps": lambda: f"the teleport divides the loss by {least(DECIDES)}",
        "size": lambda: (
            f"the teleport divides the loss by {least(_WITHOUT)} over none at all, as random elements of the same size "
            "do"
        ),
        "nothing": lambda: "the teleport brings nothing here",
        "harms": lambda: "the teleport does harm here",
    }[verdict_of(moves_by, against, place)]()


def in_words(moves_by: str, against: Mapping[str, Any], steps: int, seeds: int) -> str:
    """Sentences on the effect of a teleport, with the ratios that decide.

    Args:
        moves_by: as in `verdict_of`.
        against: as in `verdict_of`; `seconds` may be missing.
        steps: the budget.
        seeds: number of meta-seeds.
    """
    if moves_by == "none":
        return f"{REFERENCE}: no teleport is learned here; all gain is the step's."
    if verdict_of(moves_by, against) == "unknown":
        return f"{REFERENCE}: the effect of the teleport was not measured; run {' and '.join(DECIDES)} too (--methods)."
    ends = {name: _at(each) for name, each in against.items()}
    deciding = [name for name in DECIDES if name in against]

    def told(ratios: Mapping[str, Any], names: Sequence[str], whose: bool = False) -> str:
        seed = " (seed {})" if whose else ""
        return ", ".join(
            f"{AGAINST[name]}: {interval(ratios[name])}{seed.format(ratios[name].get('seed'))}" for name in names
        )

    sentence = f"{REFERENCE}: {opening_of(moves_by, against)} at {steps} gradient evaluations ({KINDS[moves_by]}). "
    sentence += f"Other losses over the learned one's, at equal evaluations: {told(ends, deciding)}"
    timed = {name: over_seeds(each)["seconds"] for name, each in against.items() if "seconds" in over_seeds(each)}
    if all(name in timed for name in deciding):
        sentence += f"; at equal seconds: {told(timed, deciding)}"
    sentence += "."
    if seeds > 1:
        worst = {name: ends[name]["worst"] for name in deciding}
        sentence += f" Intervals are over tasks and {seeds} meta-seeds; the worst meta-seed: "
        sentence += told(worst, deciding, whose=True) + "."
    others = [name for name in against if name not in deciding]
    return sentence + (f" Further methods: {told(ends, others)}." if others else "")


def left_out(without: Mapping[str, Any]) -> list[str]:
    """A sentence on the runs that leave out a part of the basis, in a list; empty without such runs.

    Args:
        without: by method the result of `metateleport.evaluation.compared.compared`.
    """
    if not without:
        return []
    said = "; ".join(f"{name.removeprefix(ABLATED)}: {interval(_at(each))}" for name, each in without.items())
    return [f"Losses without a part of the basis over the learned one's: {said}."]


def ahead_or_behind(baselines: Mapping[str, Any], seeds: int) -> list[str]:
    """A sentence on the rivals that the learned method is ahead of or behind, by intervals without 1, in a list.

    Args:
        baselines: by method the result of `metateleport.evaluation.compared.compared`.
        seeds: number of meta-seeds; if there are several, the worst one's ratios decide.
    """
    said: dict[str, list[str]] = {"ahead of": [], "behind": []}
    for name, each in baselines.items():
        at: dict[str, list[str]] = {"ahead of": [], "behind": []}
        for mark in over_seeds(each)["gradient_evaluations"]:
            ratio = mark.get("worst", mark)
            if ratio["low"] > 1:
                at["ahead of"].append(str(mark["at"]))
            elif ratio["high"] < 1:
                at["behind"].append(str(mark["at"]))
        for side, places in at.items():
            if places:
                said[side].append(f"{name} ({', '.join(places)})")
    found = "; ".join(f"{side} {', '.join(names)}" for side, names in said.items() if names)
    if not found:
        return []
    whose = f"the worst of {seeds} meta-seeds" if seeds > 1 else "the learned method"
    return [f"At the gradient evaluations in brackets {whose} is, by intervals that leave out 1, {found}."]


def over_seeds(each: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ratios over all meta-seeds if there are several, else those of the only one."""
    found: Mapping[str, Any] = each.get("meta_seeds", each)
    return found


def interval(ratio: Mapping[str, float]) -> str:
    """A ratio with its interval.

    Example:
        >>> interval({"ratio": 2.0, "low": 1.23456, "high": 1e30})
        '2 [1.23, 1e+30]'
    """
    return "{} [{}, {}]".format(*(number(ratio[key]) for key in ("ratio", "low", "high")))


def number(value: float) -> str:
    """A number to three digits; the value that stands for a loss that is not finite becomes `not finite`.

    Example:
        >>> number(0.000123456), number(1e300)
        ('0.000123', 'not finite')
    """
    return "not finite" if abs(value) >= LARGEST else f"{value:.3g}"


def _at(each: Mapping[str, Any], place: int = -1) -> Mapping[str, Any]:
    found: Mapping[str, Any] = over_seeds(each)["gradient_evaluations"][place]
    return found
