"""The experiment `horizon` at small settings: its form, its families, and that a claim can fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.papers.experiments import ExperimentError, ExperimentResult, load_experiment
from metateleport.papers.experiments.horizon import _claims
from metateleport.papers.experiments.noisy_quadratic import NoisyQuadratic
from metateleport.papers.schedule import ScheduleSettings
from metateleport.training import Unroll

pytestmark = pytest.mark.slow(seconds=3)

SMALL: dict[str, Any] = {"horizon": 20, "unroll": 10, "seconds": 0.05, "tasks": 2, "held_out": 3, "width": 3}


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return load_experiment("horizon", SMALL).run(seed=1)


def test_a_result_is_plain_json_and_has_a_figure(result: ExperimentResult, tmp_path: Path) -> None:
    result.write(tmp_path / "a.json")
    load_experiment("horizon", SMALL).plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for found in result.results["families"].values():
        assert list(found) == ["tbptt", "es", "pes"]
        for each in found.values():
            assert each["meta_steps"] >= 1
            assert (len(each["along"]), len(each["along"][0]), len(each["meta_losses"])) == (20, 3, 3)
    assert len(result.claims) == 8


def test_claims_follow_the_figures(result: ExperimentResult) -> None:
    families = {
        name: {key: dict(each) for key, each in found.items()} for name, found in result.results["families"].items()
    }
    for found in families.values():
        for each, loss in zip(found.values(), (3.0, 2.0, 1.0), strict=True):
            each["along"] = [*each["along"][:-1], [loss] * 3]
    families["noisy_quadratic"]["tbptt"]["schedule"] = [[math.log(0.1), 1.0]]
    families["noisy_quadratic"]["pes"]["schedule"] = [[math.log(0.2), 0.0]]
    by_words = {claim.claim: claim for claim in _claims(families, result.results["best_schedule"], 0)}
    lower = [claim for words, claim in by_words.items() if words.startswith("PES ends lower")]
    assert [claim.holds for claim in lower] == [True] * 4
    assert [round(claim.value, 6) for claim in lower] == [3.0, 2.0, 3.0, 2.0]
    (short,) = (claim for words, claim in by_words.items() if "too short" in words)
    assert short.value == pytest.approx(0.5 / 11)
    assert short.holds


@pytest.mark.parametrize("changes", [{"unroll": 3}, {"horizon": 25}, {"seconds": 0.0}, {"held_out": 1}])
def test_settings_that_cannot_work(changes: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=next(iter(changes))):
        load_experiment("horizon", {**SMALL, **changes})


def test_a_noisy_quadratic_has_its_minimum_at_the_origin_and_equal_noise_in_every_direction() -> None:
    task = NoisyQuadratic(dimension=4, samples=4000, condition=100.0).task(0)
    (centres,), spectrum = task.inputs, task.model.spectrum
    assert torch.allclose(spectrum, torch.tensor([0.01, 0.01 ** (2 / 3), 0.01 ** (1 / 3), 1.0]))
    assert torch.allclose(centres.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(centres.square().mean(0) * spectrum, torch.ones(4), atol=0.1)
    assert task.measure is not None
    weights = {"x": torch.tensor([1.0, 0.0, 0.0, 2.0])}
    assert float(task.measure.function(weights, *task.measure.data)) == pytest.approx(0.005 + 2.0)


def test_a_schedule_takes_the_steps_of_gradient_descent() -> None:
    meta = MetaOptimizer(MetaOptimizerConfig(ScheduleSettings(lr=0.5), None, groups=()))
    with torch.no_grad():
        meta.rule.numbers.weight[1] = 2.0
    family = NoisyQuadratic(dimension=3, noise=0.0, samples=1, condition=10.0)
    stack = family.stack(range(2))
    x, spectrum = stack.tensors()["x"].clone(), family.task(0).model.spectrum
    Unroll(stack, meta).window(3, track=False)
    for time in range(3):
        x = x - 0.5 * (1 + time / 100) ** -2.0 * spectrum * x
    assert torch.allclose(stack.tensors()["x"], x, rtol=1e-5)
