"""The report of the few-shot comparison: paired intervals over tasks, sentences and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks._fewshot_methods import METHODS, base_of
from metateleport.evaluation.paired import paired_ratio

__all__ = ["compare", "page_of", "words_of"]


def compare(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compares two methods on the same held-out tasks and meta-seeds.

    Args:
        ours: results of `one_seed` for one method, by meta-seed.
        theirs: the same for the other method.

    Returns:
        `loss`: the median over tasks of the other's loss over ours, above 1 if ours is better, with its interval; each
        task's loss is the geometric mean over meta-seeds. `by_seed`: that ratio for every meta-seed. `accuracy`: the
        mean difference, ours minus the other's, with its interval. `meta_seconds` and `adapt_seconds`: ours over the
        other's, median over meta-seeds. `verdict`: `better` or `worse` if the interval leaves out 1 and no meta-seed
        contradicts it, else `no difference`.
    """
    mine, others = (np.array([each["losses"] for each in side]).clip(1e-300, 1e300) for side in (ours, theirs))
    loss = paired_ratio(*(np.exp(np.log(side).mean(0)) for side in (others, mine)))
    by_seed = [paired_ratio(b, a).ratio for a, b in zip(mine, others, strict=True)]
    difference = np.mean([each["accuracies"] for each in ours], 0) - np.mean([each["accuracies"] for each in theirs], 0)
    verdict = "no difference"
    if loss.low > 1 and min(by_seed) > 1:
        verdict = "better"
    if loss.high < 1 and max(by_seed) < 1:
        verdict = "worse"
    seconds = {
        name: float(np.median([a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]))
        for name in ("meta_seconds", "adapt_seconds")
    }
    return {
        "loss": loss._asdict(),
        "by_seed": by_seed,
        "accuracy": _mean_interval(difference),
        **seconds,
        "verdict": verdict,
    }


def _mean_interval(values: Any, draws: int = 2000) -> dict[str, float]:
    """The mean and its percentile bootstrap interval of 95 %."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def words_of(methods: Mapping[str, Any]) -> list[str]:
    """One sentence for every method that teleports, and one for Meta-Curvature."""
    sentences = []
    for name, each in methods.items():
        base = base_of(name)
        if base not in each["against"]:
            continue
        found = each["against"][base]
        ratio, accuracy = found["loss"], found["accuracy"]
        opening = {
            "better": "lowers the held-out loss of",
            "worse": "harms",
            "no difference": "brings nothing to",
        }[found["verdict"]]
        sentences.append(
            f"{METHODS[name]}: {opening} {METHODS[base]}; its loss over this one's is {_ratio(ratio)} (meta-seeds "
            f"{', '.join(f'{value:.2f}' for value in found['by_seed'])}), accuracy {_points(accuracy)} points."
        )
    return sentences


def page_of(report: Mapping[str, Any]) -> str:
    """The comparison as a page in Markdown."""
    settings, family = report["settings"], report["family"]["settings"]
    lines = [
        "# Teleportation in the inner loop of few-shot learners",
        "",
        "Does a teleport before each inner step help MAML and Meta-SGD? Made by "
        "`python -m benchmarks.fewshot --markdown docs/fewshot.md`, "
        f"{report['seconds'] / 60:.0f} minutes on one thread, {report['conditions']['torch']}.",
        "",
        f"- **Tasks**: {family['ways']}-way {family['shots']}-shot classification of scikit-learn's digits, each digit "
        f"in two rotations (the family `fewshot_digits`, {family['queries']} queries a class). The "
        f"{settings['tasks']} held-out tasks use digits that neither training nor validation tasks have.",
        f"- **Meta-training**: {settings['seeds']} meta-seeds, {settings['meta_steps']} meta-steps of 8 tasks, second "
        f"order, {settings['inner_steps']} inner steps.",
        f"- **Cost**: all methods spend {settings['inner_steps']} gradient evaluations a task. The symmetries "
        f"(rescaling of {family['hidden']} units, GL({family['bottleneck']}) of the bottleneck) are exact, so the "
        "gradient is carried along and choosing the element is algebra. The seconds columns show the cost of that "
        "algebra, over the seconds of the compared method in the same run; on a shared machine they are rough.",
        "- **Inner learning rate**: each method has its own, tuned on validation tasks by meta-trainings of a quarter "
        "of the length from meta-seed 0, on a grid of factor 2.5 that is extended where the best is at its end.",
        "- **ratio**: the loss of the method under *against* over the loss of this row, task by task; above 1 this row "
        "is better. Brackets are 95 % intervals over tasks, with meta-seeds averaged.",
        "",
        *_trained_by(report["checkpoint"]),
        "| method | inner rate | median held-out loss | accuracy | against | ratio [95 %] | by meta-seed "
        "| accuracy, points | seconds, meta-training | seconds, adapting | drift |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in report["methods"].items():
        seeds = each["seeds"]
        row = [
            METHODS[name],
            f"{each['lr']:g}",
            f"{np.median([seed['loss'] for seed in seeds]):.3f}",
            f"{100 * np.mean([seed['accuracy'] for seed in seeds]):.1f} %",
        ]
        against = each["against"].get(base_of(name))
        if against is None:
            row += [""] * 6
        else:
            row += [
                METHODS[base_of(name)],
                _ratio(against["loss"]),
                " ".join(f"{value:.2f}" for value in against["by_seed"]),
                _points(against["accuracy"]),
                f"{against['meta_seconds']:.1f}x",
                f"{against['adapt_seconds']:.1f}x",
            ]
        row.append(f"{max(seed['drift'] for seed in seeds):.0e}" if "+" in name else "")
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *(f"- {sentence}" for sentence in report["in_words"]), "", *_switched_off(report)]
    return "\n".join(lines) + "\n"


def _trained_by(checkpoint: Mapping[str, str]) -> list[str]:
    if not checkpoint:
        return []
    weights = checkpoint["weights_sha256"][:12]
    return [f"The teleporter `digits` has the weights {weights}, trained by `{checkpoint['command']}`.", ""]


def _switched_off(report: Mapping[str, Any]) -> list[str]:
    """The section on learners that were meta-trained with a teleport and adapt without it."""
    rows = []
    for name, each in report["methods"].items():
        if any(seed["losses_teleport_off"] is None for seed in each["seeds"]):
            continue
        on, off = (
            np.exp(np.log(np.array([seed[key] for seed in each["seeds"]]).clip(1e-300, 1e300)).mean(0))
            for key in ("losses", "losses_teleport_off")
        )
        rows.append(f"| {METHODS[name]} | {_ratio(paired_ratio(off, on)._asdict())} |")
    if not rows:
        return []
    return [
        "With the teleport switched off after meta-training, from the same start at the same rates (loss without over "
        "loss with it):",
        "",
        "| method | ratio [95 %] |",
        "|---|---|",
        *rows,
    ]


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _points(found: Mapping[str, float]) -> str:
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
