"""What the learned teleport brings: its result beside the same run without it, at equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.paired import CONFIDENCE, REFERENCE, paired_ratio
from metateleport.evaluation.run import Evaluation, Result

__all__ = ["AGAINST", "attribution_of", "marks", "words_of"]

AGAINST: dict[str, str] = {
    f"{REFERENCE}/teleport-off": "the same networks with the teleport off",
    f"{REFERENCE}/stays-off": "the same networks without the teleport that stays",
    f"{REFERENCE}/gauge-off": "the same networks without the gauge",
    f"{REFERENCE}/random-teleport": "a random element of the same size",
    f"{REFERENCE}/step-only": "a step learned without a teleport",
    "whitening": "whitening by hand",
    "gradient-ascent": "gradient ascent",
}
"""What a learned result is attributed by, and how a sentence calls it."""

_DECIDES = (f"{REFERENCE}/teleport-off", f"{REFERENCE}/step-only")
_KINDS = {
    "stays": "a teleport that stays: the model is elsewhere on its orbit",
    "undone": "a gauge undone after the step: the model never moves along its orbit",
    "both": "a teleport that stays, and a gauge undone after the step",
}


def marks(steps: int) -> list[int]:
    """The numbers of gradient evaluations that are reported: a tenth, a third and all of the budget.

    Example:
        >>> marks(100)
        [10, 33, 100]
    """
    return list(dict.fromkeys(max(1, place) for place in (steps // 10, steps // 3, steps)))


def attribution_of(evaluation: Evaluation) -> dict[str, Any]:
    """Compares a learned result, task by task, with what tells whose merit it is.

    A ratio is the other method's loss over the learned one's: above 1 the learned one is better.

    Args:
        evaluation: with a learned method.

    Returns:
        Empty where nothing was learned. Else by the learned method's name: `gauge` (`stays`, `undone`, `both` or
        `none`); `against`, by method what `compared` gives; `brings`, the same for the teleport that stays and for
        the gauge undone after the step, each alone, or `none` where it has no such part, or `not run`; `verdict`
        (`helps`, `nothing`, `harms` or `unknown`); and `in_words`.
    """
    learned = evaluation.results.get(REFERENCE)
    if learned is None:
        return {}
    against = {
        name: compared(learned, evaluation.results[name], evaluation.steps)
        for name in AGAINST
        if name in evaluation.results
    }
    verdict = _verdict(learned.gauge, against)
    return {
        REFERENCE: {
            "gauge": learned.gauge,
            "confidence": CONFIDENCE,
            "against": against,
            "brings": {kind: _part(kind, learned.gauge, against) for kind in ("stays", "undone")},
            "verdict": verdict,
            "in_words": _in_words(learned.gauge, against, verdict, evaluation.steps),
        }
    }


def compared(learned: Result, other: Result, steps: int) -> dict[str, Any]:
    """Paired ratios of another method's losses over the learned one's.

    Args:
        learned: the learned method's result.
        other: another's on the same tasks.
        steps: the budget of both.

    Returns:
        `gauge` of the other; `gradient_evaluations`, a list of `at`, `ratio`, `low`, `high` at a tenth, a third and
        all of the budget; `seconds`, the same at the time when the faster of the two had spent its budget.
    """
    mine, theirs = learned.trajectory, other.trajectory
    by_evaluations = [{"at": place, **_ratio(theirs.loss[:, place], mine.loss[:, place])} for place in marks(steps)]
    seconds = float(min(mine.seconds_along[-1], theirs.seconds_along[-1]))
    places = [int(np.searchsorted(each.seconds_along, seconds, side="right")) - 1 for each in (theirs, mine)]
    by_seconds = {"at": seconds, **_ratio(theirs.loss[:, places[0]], mine.loss[:, places[1]])}
    return {"gauge": other.gauge, "gradient_evaluations": by_evaluations, "seconds": by_seconds}


def words_of(report: Mapping[str, Any]) -> list[str]:
    """The sentences of a report's attributions, for people."""
    return [each["in_words"] for each in report.get("attribution", {}).values()]


def _ratio(theirs: npt.NDArray[np.float64], mine: npt.NDArray[np.float64]) -> dict[str, float]:
    # What is not a number has diverged, and counts as the largest loss.
    other, learned = (np.nan_to_num(each, nan=np.inf, posinf=np.inf) for each in (theirs, mine))
    return paired_ratio(other, learned)._asdict()


def _part(kind: str, gauge: str, against: Mapping[str, Any]) -> Any:
    if gauge not in (kind, "both"):
        return "none"
    alone = f"{REFERENCE}/{'stays' if kind == 'stays' else 'gauge'}-off"
    return against.get(alone if gauge == "both" else f"{REFERENCE}/teleport-off", "not run")


def _verdict(gauge: str, against: Mapping[str, Any]) -> str:
    """Whether the teleport helps: ahead, with its interval, both of itself switched off and of a step learned alone."""
    if gauge == "none":
        return "nothing"
    ends = [against[name]["gradient_evaluations"][-1] for name in _DECIDES if name in against]
    if not ends:
        return "unknown"
    if all(end["low"] > 1 for end in ends):
        return "helps"
    return "harms" if any(end["high"] < 1 for end in ends) else "nothing"


def _in_words(gauge: str, against: Mapping[str, Any], verdict: str, steps: int) -> str:
    if gauge == "none":
        return f"{REFERENCE}: no teleport is learned here; what it gains is the step's."
    if verdict == "unknown":
        return (
            f"{REFERENCE}: what the teleport brings was not measured; run {' and '.join(_DECIDES)} beside it "
            "(--methods)."
        )
    ends = {name: each["gradient_evaluations"][-1] for name, each in against.items()}
    timed = {name: each["seconds"] for name, each in against.items()}
    deciding = [name for name in _DECIDES if name in against]
    shown = ", ".join(f"{AGAINST[name]}: {_interval(ends[name])}" for name in deciding)
    opening = {
        "helps": f"the teleport divides the loss by {_interval(min((ends[n] for n in deciding), key=_ratio_of))}",
        "nothing": "the teleport brings nothing here",
        "harms": "the teleport does harm here",
    }[verdict]
    sentence = f"{REFERENCE}: {opening} at {steps} gradient evaluations ({_KINDS[gauge]}). Losses of others over the "
    sentence += f"learned one's, at equal evaluations: {shown}; at equal seconds: "
    sentence += ", ".join(f"{AGAINST[name]}: {_interval(timed[name])}" for name in deciding) + "."
    others = [name for name in against if name not in deciding]
    if others:
        sentence += " Beside it, " + ", ".join(f"{AGAINST[name]}: {_interval(ends[name])}" for name in others) + "."
    return sentence


def _ratio_of(end: Mapping[str, float]) -> float:
    return end["ratio"]


def _interval(end: Mapping[str, float]) -> str:
    return f"{end['ratio']:.3g} [{end['low']:.3g}, {end['high']:.3g}]"
