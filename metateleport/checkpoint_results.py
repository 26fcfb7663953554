"""Results of evaluations in the card of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metateleport.checkpoint import update_card

__all__ = ["record_result"]


def record_result(path: str | Path, report: Mapping[str, Any], command: str) -> None:
    """Writes an evaluation's medians into a checkpoint's card, one entry for each task and its settings.

    Args:
        path: the checkpoint's folder.
        report: what `metateleport.evaluation.report_of` gave.
        command: the command that made it.
    """
    results = json.loads((Path(path) / "card.json").read_text()).get("results", {})
    places = [place for place in (12, 30, 100, 300, 1000) if place < report["steps"]] + [report["steps"]]
    settings = ", ".join(f"{name}={value}" for name, value in report["task"]["settings"].items())
    methods = {}
    for name, entry in report["methods"].items():
        methods[name] = {
            "median_loss": {str(place): entry["median"][place] for place in places},
            "diverged": sum(entry["diverged"]),
            "seconds": entry["seconds"],
        }
        for key in ("drift_max", "paired_ratio_to_learned"):
            if key in entry:
                methods[name][key] = entry[key]
    result = {key: report[key] for key in ("tasks", "steps", "seed", "dtype", "conditions")}
    key = f"{report['task']['name']}({settings})"
    update_card(path, {"results": {**results, key: {**result, "command": command, "methods": methods}}})
