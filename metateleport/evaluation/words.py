"""What ratios of losses say about a learned result, in words."""

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
"""What a learned result is attributed by, and how a sentence calls it."""

ABLATED = f"{REFERENCE}/without "
"""How the name of a run begins that leaves parts of the basis out."""

DECIDES = (f"{REFERENCE}/teleport-off", f"{REFERENCE}/step-only", f"{REFERENCE}/random-teleport")
"""What a teleport has to be ahead of, to be said to help."""

KINDS = {
    "stays": "a teleport that stays: the model is elsewhere on its orbit",
    "undone": "a gauge undone after the step: the model never moves along its orbit",
    "both": "a teleport that stays, and a gauge undone after the step",
}
"""How a group element is used, by its short name."""


def verdict_of(moves_by: str, against: Mapping[str, Any], place: int = -1) -> str:
    """Whether a teleport helps: ahead, with its interval, of none, of a step learned alone and of a random element.

    Args:
        moves_by: `stays`, `undone`, `both` or `none`.
        against: by method what `metateleport.evaluation.compared.compared` gives.
        place: which of the marks; the last if not given.

    Returns:
        `helps`, `nothing`, `harms`, or `unknown` where nothing that decides was run.
    """
    if moves_by == "none":
        return "nothing"
    ends = [_at(against[name], place) for name in DECIDES if name in against]
    if not ends:
        return "unknown"
    if all(end["low"] > 1 for end in ends):
        return "helps"
    return "harms" if any(end["high"] < 1 for end in ends) else "nothing"


def opening_of(moves_by: str, against: Mapping[str, Any], place: int = -1) -> str:
    """The verdict as a clause, with the smallest of the ratios that decide where it helps.

    Args:
        moves_by: as for `verdict_of`, which is known.
        against: as for `verdict_of`.
        place: which of the marks.

    Example:
        >>> end = {"at": 30, "ratio": 2.0, "low": 1.5, "high": 2.5}
        >>> opening_of("stays", {"learned/step-only": {"gradient_evaluations": [end]}})
        'the teleport divides the loss by 2 [1.5, 2.5]'
    """
    ends = [_at(against[name], place) for name in DECIDES if name in against]
    return {
        "helps": lambda: f"the teleport divides the loss by {interval(min(ends, key=lambda end: end['ratio']))}",
        "nothing": lambda: "the teleport brings nothing here",
        "harms": lambda: "the teleport does harm here",
    }[verdict_of(moves_by, against, place)]()


def in_words(moves_by: str, against: Mapping[str, Any], steps: int, seeds: int) -> str:
    """What a teleport brings, with the ratios that decide.

    Args:
        moves_by: as for `verdict_of`.
        against: as for `verdict_of`; `seconds` may be missing.
        steps: the budget.
        seeds: number of meta-seeds.
    """
    if moves_by == "none":
        return f"{REFERENCE}: no teleport is learned here; what it gains is the step's."
    if verdict_of(moves_by, against) == "unknown":
        return (
            f"{REFERENCE}: what the teleport brings was not measured; run {' and '.join(DECIDES)} beside it "
            "(--methods)."
        )
    ends = {name: _at(each) for name, each in against.items()}
    deciding = [name for name in DECIDES if name in against]

    def told(ratios: Mapping[str, Any], names: Sequence[str], whose: bool = False) -> str:
        seed = " (seed {})" if whose else ""
        return ", ".join(
            f"{AGAINST[name]}: {interval(ratios[name])}{seed.format(ratios[name].get('seed'))}" for name in names
        )

    sentence = f"{REFERENCE}: {opening_of(moves_by, against)} at {steps} gradient evaluations ({KINDS[moves_by]}). "
    sentence += f"Losses of others over the learned one's, at equal evaluations: {told(ends, deciding)}"
    timed = {name: over_seeds(each)["seconds"] for name, each in against.items() if "seconds" in over_seeds(each)}
    if all(name in timed for name in deciding):
        sentence += f"; at equal seconds: {told(timed, deciding)}"
    sentence += "."
    if seeds > 1:
        worst = {name: ends[name]["worst"] for name in deciding}
        sentence += f" Intervals are over tasks and {seeds} meta-seeds; the worst meta-seed: "
        sentence += told(worst, deciding, whose=True) + "."
    others = [name for name in against if name not in deciding]
    return sentence + (f" Beside it, {told(ends, others)}." if others else "")


def left_out(without: Mapping[str, Any]) -> list[str]:
    """A sentence on the runs that leave out a part of the basis, or none.

    Args:
        without: by method what `metateleport.evaluation.compared.compared` gives.
    """
    if not without:
        return []
    said = "; ".join(f"{name.removeprefix(ABLATED)}: {interval(_at(each))}" for name, each in without.items())
    return [f"With a part of the basis left out, others' losses over the learned one's: {said}."]


def ahead_or_behind(baselines: Mapping[str, Any], seeds: int) -> list[str]:
    """A sentence on the baselines that the learned result is ahead of or behind, by an interval that excludes 1.

    Args:
        baselines: by method what `metateleport.evaluation.compared.compared` gives.
        seeds: number of meta-seeds; of several the worst speaks.
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
    whose = f"the worst of {seeds} meta-seeds" if seeds > 1 else "by an interval that excludes 1 it"
    return [f"Of the baselines, at the numbers of gradient evaluations in brackets, {whose} is {found}."]


def over_seeds(each: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ratios over all meta-seeds where there are several, else those of the one."""
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
    """A number to three digits; what stands for one that is not finite is said.

    Example:
        >>> number(0.000123456), number(1e300)
        ('0.000123', 'not finite')
    """
    return "not finite" if abs(value) >= LARGEST else f"{value:.3g}"


def _at(each: Mapping[str, Any], place: int = -1) -> Mapping[str, Any]:
    found: Mapping[str, Any] = over_seeds(each)["gradient_evaluations"][place]
    return found
