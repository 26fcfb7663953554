"""An evaluation in MLflow: a run for the whole of it, and a child for each method."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metateleport.tracking.conditions import conditions
from metateleport.tracking.delivery import KEY, WEIGHTS
from metateleport.tracking.runs import Run, log10_of

__all__ = ["track_evaluation"]

_CURVES = ("median", "mean", "q25", "q75")


def track_evaluation(
    report: Mapping[str, Any],
    files: Sequence[str | Path] = (),
    card: Mapping[str, Any] | None = None,
    note: str = "",
    say: Callable[[str], None] | None = None,
) -> dict[str, str | None]:
    """Tracks an evaluation in the experiment named after its task.

    One run is the evaluation's: it has its plot, its JSON and the ratios to the learned method, and is a child of the
    meta-training of the checkpoint, where that is known. Each method's run is its child. All of these have the same
    metric names (`loss_median`, `loss_mean`, `loss_q25`, `loss_q75` along the gradient evaluations, `log10_loss_...`
    beside them, `final_median`, `diverged`, `seconds`), so that the UI's compare page plots them together, earlier
    evaluations included.

    Args:
        report: an evaluation's report, as `metateleport.evaluation.report_of` returns it.
        files: plot and JSON; stored with the evaluation's run.
        card: the checkpoint's card; None for an evaluation of rivals alone.
        note: the description of the evaluation's run, in markdown.
        say: called with messages.

    Returns:
        The ids of the runs by method name, and that of the evaluation as `evaluation`; None where MLflow does not know
        a run yet.

    Raises:
        TrackingError: if MLflow is not installed or its store is of a kind that it does not write to.
    """
    together = uuid.uuid4().hex[:8]
    shared = {key: report[key] for key in ("checkpoint", "seed", "tasks", "steps", "dtype")}
    shared.update({f"task.{name}": value for name, value in report["task"]["settings"].items()})
    common = {**conditions(), **report["conditions"], "evaluation": together, "checkpoint": report["checkpoint"]}
    task, ids = report["task"]["name"], {}
    parent, weights = {}, {}
    if card is not None:
        weights = {WEIGHTS: str(card.get("weights_sha256", ""))}
        own = card.get("training", {}).get("tracking_run")
        parent = {**({KEY: own} if own else {}), **weights}
    name = f"{report['checkpoint']} on {task} ({together})"
    tags = {**common, **weights, "kind": "evaluation"}
    with Run(task, name, shared, tags, say, parent=parent) as whole:
        whole.log(final_ratios(report), report["steps"])
        if note:
            whole.note(note)
        for path in files:
            whole.artifact(path, under="plots" if Path(path).suffix != ".json" else None)
    ids["evaluation"] = whole.id
    for method, entry in report["methods"].items():
        parameters = {**shared, "method": method}
        parameters.update({f"method.{key}": value for key, value in entry["settings"].items()})
        tags = {**common, "kind": "method", "method": method}
        with Run(task, f"{method} ({together})", parameters, tags, say, parent={KEY: whole.key}) as run:
            _log_method(run, entry, report["steps"])
        ids[method] = run.id
    return ids


def _log_method(run: Run, entry: Mapping[str, Any], steps: int) -> None:
    curves = {f"loss_{key}": entry[key] for key in _CURVES}
    if all(value >= 0 for value in entry["q25"]):
        curves.update({f"log10_{name}": [log10_of(value) for value in values] for name, values in curves.items()})
    for beside in ("held_out_loss", "held_out_accuracy"):
        if beside in entry:
            curves[f"{beside}_median"] = entry[beside]["median"]
    run.log_curves(curves)
    final = entry["median"][-1]
    summary = {"final_median": final, "diverged": sum(entry["diverged"]), "seconds": entry["seconds"]}
    if final >= 0:
        summary["final_log10_median"] = log10_of(final)
    if "drift_max" in entry:
        summary["drift_max"] = entry["drift_max"]
    if "held_out_accuracy" in entry:
        summary["final_held_out_accuracy"] = entry["held_out_accuracy"]["median"][-1]
    ratio = entry.get("paired_ratio_to_learned")
    if ratio is not None:
        summary["final_ratio_to_learned"] = ratio["ratio"]
    run.log(summary, step=steps)


def final_ratios(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures by which evaluations are ranked: the learned method's median and each method's ratio to it."""
    methods = report["methods"]
    found: dict[str, float] = {"methods": float(len(methods))}
    learned = methods.get("learned")
    if learned is not None:
        found["final_median"] = learned["median"][-1]
        if found["final_median"] >= 0:
            found["final_log10_median"] = log10_of(found["final_median"])
    for name, entry in methods.items():
        ratio = entry.get("paired_ratio_to_learned")
        if ratio is not None:
            found[f"ratio/{name}"] = ratio["ratio"]
    return found
