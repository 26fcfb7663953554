"""What the learned teleport brings: its result beside the same run without it, at equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metateleport.evaluation.compared import compared, pairs_of
from metateleport.evaluation.paired import CONFIDENCE, REFERENCE
from metateleport.evaluation.run import Evaluation, Result

__all__ = ["ABLATED", "AGAINST", "attribution_of", "goes_below_zero", "words_of"]

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

_DECIDES = (f"{REFERENCE}/teleport-off", f"{REFERENCE}/step-only", f"{REFERENCE}/random-teleport")
_KINDS = {
    "stays": "a teleport that stays: the model is elsewhere on its orbit",
    "undone": "a gauge undone after the step: the model never moves along its orbit",
    "both": "a teleport that stays, and a gauge undone after the step",
}


def attribution_of(evaluation: Evaluation) -> dict[str, Any]:
    """Compares a learned result, task by task, with what tells whose merit it is.

    A ratio is the other method's loss over the learned one's: above 1 the learned one is better.

    Args:
        evaluation: with a learned method.

    Returns:
        Empty where nothing was learned. Else by the learned method's name: `gauge` (`stays`, `undone`, `both` or
        `none`); `against`, by method what `compared` gives; `baselines`, the same for the optimizers that do not
        teleport; `without`, by part of the basis the same for the run that leaves it out; `meta_seeds`, their number;
        `brings`, the same for the teleport that stays and for the gauge undone after the step, each alone, or `none`
        where it has no such part, or `not run`; `verdict` (`helps`, `nothing`, `harms` or `unknown`); and `in_words`.
    """
    learned = evaluation.results.get(REFERENCE)
    if learned is None:
        return {}
    if goes_below_zero(evaluation):
        return _no_ratios(learned)

    def beside(name: str) -> dict[str, Any]:
        return compared(learned, evaluation.results[name], evaluation.steps, pairs_of(evaluation, name))

    against = {name: beside(name) for name in AGAINST if name in evaluation.results}
    ablated = [name for name in evaluation.results if name.startswith(ABLATED)]
    others = [name for name in evaluation.results if name not in (*AGAINST, *ablated, REFERENCE)]
    baselines, without = {name: beside(name) for name in others}, {name: beside(name) for name in ablated}
    verdict = _verdict(learned.gauge, against)
    seeds = max(1, len(evaluation.meta_seeds))
    words = _in_words(learned.gauge, against, verdict, evaluation.steps, seeds)
    return {
        REFERENCE: {
            "gauge": learned.gauge,
            "confidence": CONFIDENCE,
            "meta_seeds": seeds,
            "against": against,
            "baselines": baselines,
            "without": {name.removeprefix(ABLATED): each for name, each in without.items()},
            "brings": {kind: _part(kind, learned.gauge, against) for kind in ("stays", "undone")},
            "verdict": verdict,
            "in_words": " ".join([words, *_without(without), *_ahead_or_behind(baselines, seeds)]),
        }
    }


def goes_below_zero(evaluation: Evaluation) -> bool:
    """Whether a loss of any method is below zero anywhere: a ratio of losses then says nothing."""
    runs = [*evaluation.results.values(), *(run for seed in evaluation.meta_seeds for run in seed.results.values())]
    return any(bool((run.trajectory.loss < 0).any()) for run in runs)


def _no_ratios(learned: Result) -> dict[str, Any]:
    return {
        REFERENCE: {
            "gauge": learned.gauge,
            "confidence": CONFIDENCE,
            "meta_seeds": 1,
            "against": {},
            "baselines": {},
            "without": {},
            "brings": dict.fromkeys(("stays", "undone"), "not run"),
            "verdict": "unknown",
            "in_words": f"{REFERENCE}: losses go below zero, where a ratio of two says nothing: none are given. "
            "Compare the medians, or evaluate with a measure that is positive.",
        }
    }


def words_of(report: Mapping[str, Any]) -> list[str]:
    """The sentences of a report's attributions, for people."""
    return [each["in_words"] for each in report.get("attribution", {}).values()]


def _part(kind: str, gauge: str, against: Mapping[str, Any]) -> Any:
    if gauge not in (kind, "both"):
        return "none"
    alone = f"{REFERENCE}/{'stays' if kind == 'stays' else 'gauge'}-off"
    return against.get(alone if gauge == "both" else f"{REFERENCE}/teleport-off", "not run")


def _verdict(gauge: str, against: Mapping[str, Any]) -> str:
    """Whether it helps: ahead, with its interval, of none, of a step learned alone and of a random element."""
    if gauge == "none":
        return "nothing"
    ends = [_best_known(against[name])["gradient_evaluations"][-1] for name in _DECIDES if name in against]
    if not ends:
        return "unknown"
    if all(end["low"] > 1 for end in ends):
        return "helps"
    return "harms" if any(end["high"] < 1 for end in ends) else "nothing"


def _in_words(gauge: str, against: Mapping[str, Any], verdict: str, steps: int, seeds: int) -> str:
    if gauge == "none":
        return f"{REFERENCE}: no teleport is learned here; what it gains is the step's."
    if verdict == "unknown":
        return (
            f"{REFERENCE}: what the teleport brings was not measured; run {' and '.join(_DECIDES)} beside it "
            "(--methods)."
        )
    ends = {name: _best_known(each)["gradient_evaluations"][-1] for name, each in against.items()}
    timed = {name: _best_known(each)["seconds"] for name, each in against.items()}
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
    if seeds > 1:
        sentence += f" Intervals are over tasks and {seeds} meta-seeds; the worst meta-seed: "
        worst = {name: ends[name]["worst"] for name in deciding}
        sentence += (
            ", ".join(f"{AGAINST[n]}: {_interval(each)} (seed {each['seed']})" for n, each in worst.items()) + "."
        )
    others = [name for name in against if name not in deciding]
    if others:
        sentence += " Beside it, " + ", ".join(f"{AGAINST[name]}: {_interval(ends[name])}" for name in others) + "."
    return sentence


def _without(without: Mapping[str, Any]) -> list[str]:
    if not without:
        return []
    ends = {name.removeprefix(ABLATED): _best_known(each)["gradient_evaluations"][-1] for name, each in without.items()}
    said = "; ".join(f"{name}: {_interval(end)}" for name, end in ends.items())
    return [f"With a part of the basis left out, others' losses over the learned one's: {said}."]


def _best_known(each: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ratios over all meta-seeds where there are several, else those of the one."""
    found: Mapping[str, Any] = each.get("meta_seeds", each)
    return found


def _ahead_or_behind(baselines: Mapping[str, Any], seeds: int) -> list[str]:
    """Which baselines the learned result is ahead of or behind, by an interval that excludes 1."""
    said: dict[str, list[str]] = {"ahead of": [], "behind": []}
    for name, each in baselines.items():
        at: dict[str, list[str]] = {"ahead of": [], "behind": []}
        for mark in _best_known(each)["gradient_evaluations"]:
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


def _ratio_of(end: Mapping[str, float]) -> float:
    return end["ratio"]


def _interval(end: Mapping[str, float]) -> str:
    return f"{end['ratio']:.3g} [{end['low']:.3g}, {end['high']:.3g}]"
