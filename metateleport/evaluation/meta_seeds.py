"""The results of every meta-seed of a checkpoint in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metateleport.evaluation.marks import marks
from metateleport.evaluation.paired import CONFIDENCE
from metateleport.evaluation.run import Evaluation, Result, SeedResults
from metateleport.evaluation.tuning import LARGEST

__all__ = ["ESTIMATOR", "meta_seeds_of"]

ESTIMATOR = (
    "interquartile mean of the log ratios of all meta-seeds and tasks; bootstrap intervals over meta-seeds and tasks, "
    "drawn apart from each other; worst: the meta-seed with the smallest median ratio, its interval over tasks"
)


def meta_seeds_of(evaluation: Evaluation, compared: Mapping[str, Any]) -> dict[str, Any]:
    """Summarises the results of the learned methods of each meta-seed.

    Args:
        evaluation: the evaluation.
        compared: by method the result of `metateleport.evaluation.compared.compared`.

    Returns:
        Empty if there is only one meta-seed. Else `seeds`, a list with `seed`, `validation`, `chosen` and `methods`
        (for each method `median_loss` by mark, `diverged` as a number of tasks, `seconds`, and `drift_max` if it
        teleports); `worst`, for each method the largest median of all seeds by mark, and `diverged` over all seeds;
        `ratios_to_learned`, for each method the ratios over seeds and tasks at the marks; `along`, for each learned
        method the smallest and the largest median of all seeds at every evaluation; `estimator` and `confidence` of
        the ratios.
    """
    if len(evaluation.meta_seeds) < 2:
        return {}
    places = marks(evaluation.steps)
    seeds = [_seed(each, places) for each in evaluation.meta_seeds]
    names = list(evaluation.meta_seeds[0].results)
    worst = {name: _worst([each["methods"][name] for each in seeds], places) for name in names}
    along = {}
    for name in names:
        medians = np.stack([_medians(each.results[name]) for each in evaluation.meta_seeds])
        along[name] = {"lowest": medians.min(0).tolist(), "highest": medians.max(0).tolist()}
    ratios = {
        name: each["meta_seeds"]["gradient_evaluations"] for name, each in compared.items() if "meta_seeds" in each
    }
    return {
        "seeds": seeds,
        "worst": worst,
        "along": along,
        "ratios_to_learned": ratios,
        "estimator": ESTIMATOR,
        "confidence": CONFIDENCE,
    }


def _seed(each: SeedResults, places: list[int]) -> dict[str, Any]:
    methods = {}
    for name, result in each.results.items():
        medians = _medians(result)
        methods[name] = {
            "median_loss": {str(place): float(medians[place]) for place in places},
            "diverged": int(result.trajectory.diverged.sum()),
            "seconds": result.trajectory.seconds,
        }
        if result.teleports:
            drift = float(np.nan_to_num(result.trajectory.drift_max or 0.0, nan=LARGEST, posinf=LARGEST))
            methods[name]["drift_max"] = drift
    return {"seed": each.seed, "validation": each.validation, "chosen": each.chosen, "methods": methods}


def _worst(seeds: list[Mapping[str, Any]], places: list[int]) -> dict[str, Any]:
    return {
        "median_loss": {str(place): max(each["median_loss"][str(place)] for each in seeds) for place in places},
        "diverged": sum(each["diverged"] for each in seeds),
    }


def _medians(result: Result) -> np.ndarray:
    loss = np.nan_to_num(result.trajectory.loss, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
    return np.asarray(np.median(loss.clip(-LARGEST, LARGEST), axis=0))
