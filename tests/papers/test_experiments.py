"""Experiments at small settings: what their claims say, and that the mathematics beneath can fail."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metateleport as mt
from metateleport.capture import point_of
from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.papers.experiments import (
    EXPERIMENTS,
    Claim,
    Experiment,
    ExperimentError,
    ExperimentResult,
    finite,
    load_experiment,
    summary_of,
)
from metateleport.papers.experiments.actions import algebra_basis, fields, flatten, unflatten
from metateleport.papers.experiments.bracket import bracket, gradient_flow
from metateleport.papers.experiments.descent import best_step, descend
from metateleport.papers.experiments.intervals import bootstrap, share_interval
from metateleport.papers.experiments.landscapes import Booth, ChartRotation, Rosenbrock, valley
from metateleport.papers.experiments.newton import split
from metateleport.papers.experiments.orbit import rank
from metateleport.point import Point

SMALL: dict[str, dict[str, Any]] = {
    "quadratic": {"functions": 2, "ascent": 150, "dimension": 4, "steps": 15, "rosenbrock": 30},
    "newton": {"functions": 6, "dimension": 4},
    "one-teleport": {"functions": 1, "dimension": 3, "steps": 20, "folds": 1.0},
    "orbit": {"largest": 130},
    "generalisation": {"networks": 5, "hidden": 4, "samples": 60, "epochs": 3, "teleport": 1, "directions": 2},
}


LONG = ("quadratic", "orbit", "generalisation", "one-teleport", "newton")
SLOW = pytest.mark.slow(seconds=8)


@pytest.fixture(scope="module")
def results() -> dict[str, ExperimentResult]:
    """Each experiment once, at its small settings."""
    return {}


@pytest.fixture
def result_of(results: dict[str, ExperimentResult]) -> Any:
    def result(name: str) -> ExperimentResult:
        if name not in results:
            results[name] = load_experiment(name, SMALL[name]).run(seed=1)
        return results[name]

    return result


def claim(result: ExperimentResult, words: str) -> Claim:
    found = [each for each in result.claims if words in each.claim]
    assert len(found) == 1, [each.claim for each in found]
    return found[0]


def no_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(no_null(each) for each in value.values())
    if isinstance(value, list | tuple):
        return all(no_null(each) for each in value)
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in LONG else ()) for name in SMALL])
def test_a_result_is_plain_json_and_has_a_figure(name: str, result_of: Any, tmp_path: Path) -> None:
    result = result_of(name)
    result.write(tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert list(read) == ["schema", "experiment", "settings", "seconds", "results", "claims"]
    assert read["settings"]["seed"] == 1
    assert read["experiment"] == name
    assert no_null({**read, "claims": []})
    for each in read["claims"]:
        assert list(each) == ["claim", "source", "value", "interval", "holds"]
        assert no_null([each["claim"], each["source"], each["value"]])
        assert each["holds"] in (True, False, None)
    load_experiment(name, SMALL[name]).plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("name", ["newton", "generalisation"])
def test_equal_seeds_give_equal_results_and_others_do_not(name: str, result_of: Any) -> None:
    again, other = (load_experiment(name, SMALL[name]).run(seed=seed) for seed in (1, 2))
    first = result_of(name).as_json()
    assert again.as_json()["results"] == first["results"]
    assert again.as_json()["claims"] == first["claims"]
    assert other.as_json()["results"] != first["results"]


@SLOW
def test_gradient_ascent_reaches_the_closed_form(result_of: Any) -> None:
    result = result_of("quadratic")
    found = claim(result, "closed form")
    assert found.value <= 1e-6
    assert found.holds is True
    assert claim(result, "Newton's direction").holds is True
    # The same teleport pays at one step size and costs at another.
    assert claim(result, "1 / (largest eigenvalue), after").holds is not False
    assert claim(result, "plain descent's best constant step").value > 1


def test_too_few_ascent_steps_do_not_reach_it() -> None:
    settings = {**SMALL["quadratic"], "ascent": 1}
    found = claim(load_experiment("quadratic", settings).run(seed=1), "closed form")
    assert found.value > 1e-6
    assert found.holds is False


def test_newton_splits_as_the_propositions_say(result_of: Any) -> None:
    result = result_of("newton")
    by_source = [each for each in result.claims if each.source.startswith("ICLR 2024, Proposition")]
    assert len(by_source) == 5
    assert all(each.holds is True for each in by_source)
    assert claim(result, "so it is in more dimensions").holds is False
    assert claim(result, "saddles").holds is False


@pytest.mark.slow(seconds=3)
def test_the_bracket_tells_the_sides_apart(result_of: Any) -> None:
    result = result_of("one-teleport")
    assert all(each.holds is True for each in result.claims), [each for each in result.claims if not each.holds]


@SLOW
def test_dimensions_of_the_orbit(result_of: Any) -> None:
    entries = {entry["model"]: entry for entry in result_of("orbit").results["models"]}
    quadratic = entries["quadratic"]
    assert quadratic["orbit"] == quadratic["level_set"] == 9
    linear = entries["leaky_mlp width=8 samples=16 activation=identity"]
    # U V of full rank: GL(8), and nothing else, leaves the product alone.
    assert linear["exact_orbit"] == linear["same_function"] == linear["minima"] == 64
    whole = entries["leaky_mlp width=8"]
    assert (whole["exact_orbit"], whole["orbit"]) == (8, 64)
    assert any(left.get("parameters", 0) > 130 for left in result_of("orbit").results["left out"])


@pytest.mark.slow(seconds=3)
def test_generalisation_pairs_the_same_networks(result_of: Any) -> None:
    results = result_of("generalisation").results
    assert all(len(values) == 5 for values in results["held_out_final"].values())
    # Until the teleport all variants are one run.
    assert len({tuple(curve[:1]) for curve in results["held_out_mean"].values()}) == 1
    assert len({tuple(curve) for curve in results["held_out_mean"].values()}) == 6
    result = result_of("generalisation")
    assert claim(result, "does not change in a teleport").holds is True
    assert 0 < claim(result, "the way they are told").value <= 1


# What they stand on.


def test_a_claim_holds_finite_numbers_only() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Claim("x", "here", float("nan"), None, None)
    with pytest.raises(ValueError, match="order"):
        Claim("x", "here", 0.0, (1.0, 0.0), None)
    assert Claim("x", "here", 0.0, None, None).as_json()["holds"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, torch.ones(1)])
def test_a_result_refuses_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match=r"results\.a\[0\]"):
        ExperimentResult("x", {}, 0.0, {"a": [value]}, []).as_json()


def test_finite() -> None:
    assert finite(float("-inf")) == -1e300
    with pytest.raises(ValueError, match="NaN"):
        finite(float("nan"))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("nothing", {}, "there are quadratic"),
        ("newton", {"width": 3}, "no setting 'width'"),
        ("newton", {"functions": "many"}, "takes int"),
        ("newton", {"dimension": 2}, "dimension of 3"),
        ("quadratic", {"functions": 1}, "two functions"),
        ("quadratic", {"condition": 0.5}, "condition"),
        ("one-teleport", {"folds": 0.0}, "folds"),
        ("orbit", {"tolerance": 2.0}, "tolerance"),
        ("generalisation", {"teleport": 40}, "before the last"),
        ("generalisation", {"samples": 10_000}, "samples"),
        ("generalisation", {"batch": 0}, "batch"),
    ],
)
def test_bad_names_and_settings_say_what_to_do(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        load_experiment(name, settings)


@SLOW
def test_no_room_for_any_model_is_told() -> None:
    with pytest.raises(ExperimentError, match="largest=1"):
        load_experiment("orbit", {"largest": 1}).run()


@pytest.mark.parametrize("kind", EXPERIMENTS.values())
def test_every_experiment_has_a_name_and_a_summary(kind: type[Experiment]) -> None:
    assert EXPERIMENTS[kind.name] is kind
    assert summary_of(kind).endswith((".", "?"))
    assert "Settings:" in (kind.__doc__ or "")


@pytest.mark.parametrize("kind", [Booth, Rosenbrock, valley(0.3, 0.5)])
def test_chart_rotations_keep_the_value_and_carry_the_gradient(kind: type[Any]) -> None:
    landscape = kind()
    symmetry = ChartRotation(landscape)
    x = landscape.x.detach()
    assert torch.allclose(kind.inverse(kind.chart(x)), x)
    gradient = torch.func.grad(kind.value)
    element = symmetry.group.random(seed=0, dtype=torch.float64)
    arrived = symmetry.act(element, Point({"x": x}, gradients={"x": gradient(x)}))
    there = arrived.parameters["x"]
    assert not torch.allclose(there, x)
    torch.testing.assert_close(kind.value(there), kind.value(x))
    torch.testing.assert_close(arrived.gradients["x"], gradient(there))


@pytest.mark.parametrize("group", [GeneralLinear(3), Orthogonal(4), PositiveDiagonal(5)], ids=lambda group: group.name)
def test_the_basis_spans_the_algebra(group: Group) -> None:
    basis = algebra_basis(group)
    assert basis.shape == (group.dimension, *group.shape)
    flat = basis.flatten(1)
    torch.testing.assert_close(flat @ flat.mT, torch.eye(group.dimension, dtype=torch.float64))
    drawn = group.random_generator(seed=0, dtype=torch.float64).flatten()
    torch.testing.assert_close(flat.mT @ (flat @ drawn), drawn)


def test_fields_are_the_velocities_of_the_action() -> None:
    task = mt.load_family("leaky_mlp", {"width": 3, "activation": "identity"}).task(0)
    symmetry = task.symmetries[0]
    point, _ = point_of(task.model, task.symmetries, task.inputs, None, lambda out: task.loss(out, *task.targets))
    names = list(dict(task.model.named_parameters()))
    found = fields([symmetry], point.detach(), names)
    h = 1e-6
    for row, direction in zip(found, algebra_basis(symmetry.group), strict=True):
        there, back = (
            flatten(symmetry.act(symmetry.group.exp(sign * h * direction), point.detach()).parameters, names)
            for sign in (1, -1)
        )
        torch.testing.assert_close(row, (there - back) / (2 * h), rtol=1e-6, atol=1e-7)
    vector = flatten(point.parameters, names)
    assert all(
        torch.equal(value, point.parameters[name]) for name, value in unflatten(vector, point.parameters, names).items()
    )


def test_the_bracket_is_that_of_the_flows() -> None:
    """[A, R]L is the second-order gap when a turn and a step down change places."""

    def value(x: Tensor) -> Tensor:
        return Rosenbrock.value(x)

    symmetry = ChartRotation(Rosenbrock())
    x = torch.tensor([0.3, -0.4], dtype=torch.float64)

    def turn(at: Tensor, t: float) -> Tensor:
        generator = t * algebra_basis(symmetry.group)[0]
        return symmetry.act(symmetry.group.exp(generator), Point({"x": at})).parameters["x"]

    def squared_norm(at: Tensor) -> Tensor:
        return torch.func.grad(value)(at).square().sum()

    found = bracket(value, lambda at: fields([symmetry], Point({"x": at}), ["x"]), x)
    h = 1e-5
    slope = (squared_norm(turn(x, h)) - squared_norm(turn(x, -h))) / (2 * h)
    torch.testing.assert_close(found.value[0], -slope, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(found.value, found.by_norm)
    assert found.slope > 1e-3


def test_the_flow_of_a_stiff_quadratic_follows_its_closed_form() -> None:
    weights = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    path = gradient_flow(lambda x: weights @ x.square() / 2, torch.ones(2, dtype=torch.float64), 7.0, 20)
    losses = path.square() @ weights / 2
    torch.testing.assert_close(
        losses.log().diff(), torch.full((20,), -7.0 / 20, dtype=torch.float64), rtol=1e-3, atol=0
    )
    # Both coordinates decay as exp(-weight t): the logarithms keep the ratio of the weights.
    torch.testing.assert_close(path[3, 1].log() / path[3, 0].log(), weights[1] / weights[0], rtol=1e-2, atol=0)


def test_the_split_adds_up_and_is_tangent() -> None:
    source = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=source, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(5, dtype=torch.float64)
    x = torch.randn(5, generator=source, dtype=torch.float64)
    found = split(lambda at: at @ matrix @ at / 2, x)
    torch.testing.assert_close(found.along + found.across, -x)
    assert abs(float(found.across @ found.gradient)) < 1e-12
    assert found.rise() > 0
    # Turned round, it goes down.
    assert float(found.ascent @ -found.across) < 0


def test_descent_and_its_best_step() -> None:
    def value(x: Tensor) -> Tensor:
        return x.square().sum() / 2

    starts = torch.ones(2, 3, dtype=torch.float64)
    assert best_step(value, starts, torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64), 5) == 1.0
    _, values = descend(value, starts, 1e200, 5)
    assert float(values.max()) == 1e300


def test_intervals_cover() -> None:
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = share_interval(int(draws.binomial(40, 0.3)), 40)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199
    low, high = bootstrap(draws.normal(1.0, 1.0, 400), lambda values: float(values.mean()))
    assert low < 1.0 < high
    assert high - low == pytest.approx(4 / 20, rel=0.2)


def test_rank_counts_what_is_not_rounding() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-14], dtype=torch.float64))
    assert rank(matrix, 1e-9) == 2
    assert rank(torch.zeros(3, 3), 1e-9) == 0
    assert rank(torch.zeros(0, 3), 1e-9) == 0
