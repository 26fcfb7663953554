"""An evaluation as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metateleport.evaluation.attribution import attribution_of, goes_below_zero
from metateleport.evaluation.compared import compared
from metateleport.evaluation.conditions import conditions_of
from metateleport.evaluation.meta_seeds import meta_seeds_of
from metateleport.evaluation.paired import CONFIDENCE, REFERENCE, paired_ratio
from metateleport.evaluation.run import Evaluation, Result
from metateleport.evaluation.tuning import LARGEST
from metateleport.evaluation.words import ABLATED
from metateleport.files import write_text

__all__ = ["SCHEMA", "against_of", "report_of", "write_report"]

SCHEMA = 1


def report_of(evaluation: Evaluation, against: str | None = None) -> dict[str, Any]:
    """An evaluation as plain values for JSON: numbers, strings, booleans; never null, NaN or infinity.

    A loss that is not finite or above 1e300 becomes 1e300, and `diverged` says so. A setting that is None becomes
    `"none"`, as on the command line.

    Args:
        evaluation: the evaluation.
        against: name of a method that all others are compared with, beside the learned one.

    Returns:
        `schema`, `task`, `measure`, `checkpoint`, `seed`, `tasks`, `steps`, `dtype`, `conditions`, and

        - `methods`, by name: the lists of the measure along the trajectory (`gradient_evaluations`, `mean`, `median`,
          `q25`, `q75`, `seconds_along`), `final` and `diverged` for each task, `seconds` of the whole run, `settings`;
          `stacked`, whether it steps all tasks at once (seconds of methods that do and that do not are not comparable);
          if it teleports also `drift_max` and `gauge`, its `moves_by`; if it was tuned also `tuning`; if the tasks have
          them also `held_out_loss` and `held_out_accuracy`; if there is a learned method also
          `paired_ratio_to_learned` at the end and `paired_ratios_to_learned`, a list of `at`, `ratio`, `low`, `high` at
          the marks. The learned methods are those of the checkpoint's chosen seed;
        - `attribution`, the result of `attribution_of`; it says so if losses below zero allow no ratios;
        - `meta_seeds`, the result of `meta_seeds_of`;
        - `against`, if it is given: `method`, its name, and `others`, the result of `compared` for each of the others;
        - `rules`, those that rivals were tuned by: `rivals` is `library` or `fair`;
        - `kept`, the names of runs that an earlier call made; their seconds are those measured then.
    """
    methods = {name: _method(result) for name, result in evaluation.results.items()}
    below = goes_below_zero(evaluation)
    attribution = attribution_of(evaluation)
    beside = {}
    if REFERENCE in methods and not below:
        found = attribution[REFERENCE]
        beside = {**found["against"], **found["baselines"], **{ABLATED + k: v for k, v in found["without"].items()}}
        for name, entry in methods.items():
            if name != REFERENCE:
                pair = paired_ratio(entry["final"], methods[REFERENCE]["final"])
                entry[f"paired_ratio_to_{REFERENCE}"] = {**pair._asdict(), "confidence": CONFIDENCE}
                entry[f"paired_ratios_to_{REFERENCE}"] = beside[name]["gradient_evaluations"]
    return {
        "schema": SCHEMA,
        "task": {"name": evaluation.family, "settings": _plain(evaluation.settings)},
        "measure": evaluation.measure,
        **({"below_zero": True} if below else {}),
        "checkpoint": evaluation.checkpoint,
        "seed": evaluation.seed,
        "tasks": evaluation.tasks,
        "steps": evaluation.steps,
        "dtype": evaluation.dtype,
        "conditions": {
            **conditions_of(evaluation.device),
            "threads": evaluation.threads,
            "jobs": evaluation.jobs,
        },
        "rules": {"rivals": "library"} if evaluation.rules is None else _plain(evaluation.rules.plain()),
        "kept": list(evaluation.kept),
        "methods": methods,
        **({} if against is None or below else {"against": against_of(evaluation, against)}),
        "attribution": attribution,
        "meta_seeds": meta_seeds_of(evaluation, beside),
    }


def against_of(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """All other methods' losses over those of one method, at equal evaluations and at equal seconds.

    Args:
        evaluation: with the method.
        name: name of the method.

    Returns:
        `method`, its name; `others`, by name the result of `compared`, in which a ratio above 1 means that the method
        named is better.
    """
    mine = evaluation.results[name]
    others = {
        other: compared(mine, result, evaluation.steps, timed=evaluation.timed)
        for other, result in evaluation.results.items()
        if other != name
    }
    return {"method": name, "others": others}


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, in one piece.

    Raises:
        ValueError: if a value is not finite.
    """
    write_text(Path(path), json.dumps(report, indent=1, allow_nan=False) + "\n")


def _method(result: Result) -> dict[str, Any]:
    trajectory = result.trajectory
    entry: dict[str, Any] = {
        "gradient_evaluations": list(range(trajectory.loss.shape[1])),
        **_along(trajectory.loss),
        "diverged": trajectory.diverged.tolist(),
        "seconds": trajectory.seconds,
        "seconds_along": trajectory.seconds_along.tolist(),
        "settings": _plain(result.settings),
        "stacked": result.stacked,
    }
    if result.teleports:
        entry["gauge"] = result.moves_by
        entry["drift_max"] = float(_finite(np.asarray(trajectory.drift_max or 0.0)))
    if trajectory.held_out_loss is not None:
        entry["held_out_loss"] = _along(trajectory.held_out_loss)
    if trajectory.held_out_accuracy is not None:
        entry["held_out_accuracy"] = _along(trajectory.held_out_accuracy)
    if result.tuning is not None:
        entry["tuning"] = _plain(result.tuning)
    return entry


def _along(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    values = _finite(values)
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    return {
        "mean": values.mean(0).tolist(),
        "median": middle.tolist(),
        "q25": low.tolist(),
        "q75": high.tolist(),
        "final": values[:, -1].tolist(),
    }


def _finite(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(values, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST).clip(-LARGEST, LARGEST)


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else str(value)
