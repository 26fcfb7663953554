"""Writes results of evaluations into the card of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metateleport.checkpoint import read_card, update_card
from metateleport.evaluation.marks import marks
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.words import ABLATED, over_seeds

__all__ = ["record_result", "result_of"]

_KEPT = ("gauge", "drift_max", "paired_ratio_to_learned", "paired_ratios_to_learned")


def record_result(path: str | Path, report: Mapping[str, Any], command: str) -> None:
    """Writes an evaluation's figures into a checkpoint's card, in an entry for the task, its settings and the budget.

    With several meta-seeds the entry has the chosen one's figures, those of every one, and ratios over all of them.

    Args:
        path: the checkpoint's folder.
        report: the evaluation's report, as `metateleport.evaluation.report_of` returns it.
        command: the command that made the evaluation.

    Raises:
        CheckpointError: if the card cannot be read.
    """
    results = read_card(Path(path)).get("results", {})
    settings = ", ".join(f"{name}={value}" for name, value in report["task"]["settings"].items())
    key = f"{report['task']['name']}({settings}), {report['steps']} gradient evaluations"
    if any(name.startswith(ABLATED) for name in report["methods"]):
        # An entry of its own, so that it does not replace the result of the whole optimizer.
        key += ", parts of the basis left out"
    rules = report.get("rules", {})
    if rules.get("rivals") == "fair":
        key += f", rivals under fair rules for the {rules['criterion']}"
    update_card(path, {"results": {**results, key: {**result_of(report), "command": command}}})


def result_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation in the form of a card: figures at the marks only, with four digits.

    Args:
        report: the evaluation's report, as `metateleport.evaluation.report_of` returns it.

    Returns:
        `task`, `measure`, `tasks`, `steps`, `seed`, `dtype`, `conditions`, and `methods`. For each method:
        `median_loss` and, if known, `held_out_accuracy` by mark; `diverged`, a number of tasks; `seconds`; `drift_max`;
        the ratios to the learned method by mark and `ratio_at_equal_seconds`, over meta-seeds if there are several.
        With several meta-seeds also `meta_seeds` with `seeds`, `worst` and `ratios_to_learned`; `target`, `against`,
        `rules` and `command` as in the report.
    """
    places = marks(report["steps"])
    timed = _timed(report)
    methods = {}
    for name, entry in report["methods"].items():
        methods[name] = {
            "median_loss": {str(place): entry["median"][place] for place in places},
            "diverged": sum(entry["diverged"]),
            "seconds": entry["seconds"],
        }
        if "held_out_accuracy" in entry:
            accuracy = entry["held_out_accuracy"]["median"]
            methods[name]["held_out_accuracy"] = {str(place): accuracy[place] for place in places}
        if "tuning" in entry:
            methods[name]["chosen"] = entry["tuning"]["chosen"]
        if not entry.get("stacked", True):
            methods[name]["stacked"] = False
        if name in timed:
            methods[name]["ratio_at_equal_seconds"] = timed[name]
        methods[name].update({key: entry[key] for key in _KEPT if key in entry})
    keys = ("task", "measure", "tasks", "steps", "seed", "dtype", "conditions")
    result = {**{key: report[key] for key in keys}, "methods": methods}
    if report["meta_seeds"]:
        result["meta_seeds"] = {key: report["meta_seeds"][key] for key in ("seeds", "worst", "ratios_to_learned")}
    for key in ("target", "against", "rules", "command"):
        if key in report:
            result[key] = report[key]
    rounded: dict[str, Any] = _rounded(result)
    return rounded


def _timed(report: Mapping[str, Any]) -> dict[str, Any]:
    """For each method the ratio to the learned one at equal seconds."""
    known = report["attribution"].get(REFERENCE, {"against": {}, "baselines": {}})
    ratios = {name: over_seeds(each) for name, each in {**known["against"], **known["baselines"]}.items()}
    return {name: each["seconds"] for name, each in ratios.items() if "seconds" in each}


def _rounded(value: Any) -> Any:
    """The value with every float rounded to four digits."""
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
