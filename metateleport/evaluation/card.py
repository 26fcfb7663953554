"""Results of evaluations in the card of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metateleport.checkpoint.checkpoint import CARD, update_card
from metateleport.evaluation.attribution import ABLATED
from metateleport.evaluation.marks import marks

__all__ = ["record_result"]

_KEPT = ("drift_max", "paired_ratio_to_learned", "paired_ratios_to_learned")


def record_result(path: str | Path, report: Mapping[str, Any], command: str) -> None:
    """Writes an evaluation's medians into a checkpoint's card, one entry for each task, its settings and the budget.

    With several meta-seeds the figures of each stand beside those of the one on top, and the ratios over all of them.

    Args:
        path: the checkpoint's folder.
        report: what `metateleport.evaluation.report_of` gave.
        command: the command that made it.
    """
    results = json.loads((Path(path) / CARD).read_text()).get("results", {})
    places = marks(report["steps"])
    methods = {}
    for name, entry in report["methods"].items():
        methods[name] = {
            "median_loss": {str(place): entry["median"][place] for place in places},
            "diverged": sum(entry["diverged"]),
            "seconds": entry["seconds"],
        }
        methods[name].update({key: entry[key] for key in _KEPT if key in entry})
    result = {key: report[key] for key in ("tasks", "steps", "seed", "dtype", "conditions")}
    result.update({"command": command, "methods": methods})
    if report["meta_seeds"]:
        result["meta_seeds"] = {key: report["meta_seeds"][key] for key in ("seeds", "worst", "ratios_to_learned")}
    if "target" in report:
        result["target"] = report["target"]
    settings = ", ".join(f"{name}={value}" for name, value in report["task"]["settings"].items())
    key = f"{report['task']['name']}({settings}), {report['steps']} gradient evaluations"
    if any(name.startswith(ABLATED) for name in methods):
        # Beside the results of the same task, not in their place.
        key += ", parts of the basis left out"
    update_card(path, {"results": {**results, key: _rounded(result)}})


def _rounded(value: Any) -> Any:
    """The same with four digits of every number that is not whole: a card is for reading."""
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
