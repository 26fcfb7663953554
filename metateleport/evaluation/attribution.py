"""Attribution: which part of a learned optimizer gives its result, by comparison at equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metateleport.evaluation.compared import compared, pairs_of
from metateleport.evaluation.paired import CONFIDENCE, REFERENCE
from metateleport.evaluation.run import LEAST_MEASURED, Evaluation, Result
from metateleport.evaluation.words import ABLATED, AGAINST, ahead_or_behind, in_words, left_out, verdict_of

__all__ = ["attribution_of", "goes_below_zero", "words_of"]


def attribution_of(evaluation: Evaluation) -> dict[str, Any]:
    """Compares a learned result, task by task, with the same run without a part, with random elements, and with others.

    A ratio is the other method's loss over the learned one's: above 1 the learned one is better.

    Args:
        evaluation: with a learned method.

    Returns:
        Empty if there is no learned method. Else, under the learned method's name: `gauge`, its `moves_by` (`stays`,
        `undone`, `both` or `none`); `against`, the result of `compared` for each run of the attribution; `baselines`,
        the same for the other optimizers; `without`, the same for each run without a part of the basis; `meta_seeds`,
        their number; `brings`, the same for the teleport that stays alone and for the gauge alone, or `none` if it has
        no such part, or `not run`; `verdict` (`helps`, `size`, `nothing`, `harms` or `unknown`); and `in_words`.
    """
    learned = evaluation.results.get(REFERENCE)
    if learned is None:
        return {}
    if goes_below_zero(evaluation):
        return _no_ratios(learned)

    def beside(name: str) -> dict[str, Any]:
        return compared(
            learned, evaluation.results[name], evaluation.steps, pairs_of(evaluation, name), evaluation.timed
        )

    against = {name: beside(name) for name in AGAINST if name in evaluation.results}
    ablated = [name for name in evaluation.results if name.startswith(ABLATED)]
    others = [name for name in evaluation.results if name not in (*AGAINST, *ablated, REFERENCE)]
    baselines, without = {name: beside(name) for name in others}, {name: beside(name) for name in ablated}
    seeds = max(1, len(evaluation.meta_seeds))
    words = in_words(learned.moves_by, against, evaluation.steps, seeds)
    if not evaluation.timed:
        words += (
            f" At equal seconds nothing is told: losses were measured every {evaluation.every} evaluations, and that "
            f"takes {evaluation.steps // LEAST_MEASURED} at most (--every)."
        )
    return {
        REFERENCE: {
            "gauge": learned.moves_by,
            "confidence": CONFIDENCE,
            "meta_seeds": seeds,
            "against": against,
            "baselines": baselines,
            "without": {name.removeprefix(ABLATED): each for name, each in without.items()},
            "brings": {kind: _part(kind, learned.moves_by, against) for kind in ("stays", "undone")},
            "verdict": verdict_of(learned.moves_by, against),
            "in_words": " ".join([words, *left_out(without), *ahead_or_behind(baselines, seeds)]),
        }
    }


def goes_below_zero(evaluation: Evaluation) -> bool:
    """Whether a loss of any method is below zero anywhere; ratios of losses then have no meaning."""
    runs = [*evaluation.results.values(), *(run for seed in evaluation.meta_seeds for run in seed.results.values())]
    return any(bool((run.trajectory.loss < 0).any()) for run in runs)


def _no_ratios(learned: Result) -> dict[str, Any]:
    return {
        REFERENCE: {
            "gauge": learned.moves_by,
            "confidence": CONFIDENCE,
            "meta_seeds": 1,
            "against": {},
            "baselines": {},
            "without": {},
            "brings": dict.fromkeys(("stays", "undone"), "not run"),
            "verdict": "unknown",
            "in_words": f"{REFERENCE}: losses go below zero, where their ratios have no meaning: none are given. "
            "Compare the medians, or evaluate with a measure that is positive.",
        }
    }


def words_of(report: Mapping[str, Any]) -> list[str]:
    """The sentences of a report's attribution."""
    return [each["in_words"] for each in report.get("attribution", {}).values()]


def _part(kind: str, moves_by: str, against: Mapping[str, Any]) -> Any:
    if moves_by not in (kind, "both"):
        return "none"
    alone = f"{REFERENCE}/{'stays' if kind == 'stays' else 'gauge'}-off"
    return against.get(alone if moves_by == "both" else f"{REFERENCE}/teleport-off", "not run")
