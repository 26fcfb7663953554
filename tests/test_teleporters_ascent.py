"""Gradient ascent and descent on the group element: closed forms, line search, caps, named failures."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import case
from torch import nn

import metateleport as mt
from metateleport.teleporters import failures_of, travel


@pytest.mark.parametrize(("dimension", "condition"), [(4, 10.0), (10, 100.0)])
@pytest.mark.parametrize("direction", ["ascent", "descent"])
def test_on_quadratics_it_reaches_the_closed_form(dimension: int, condition: float, direction: str) -> None:
    # With y = A^1/2 x of fixed norm the squared gradient y^T A y has its extremes at the outer eigenvectors.
    stack = mt.load_family("quadratic", {"dimension": dimension, "condition": condition}).stack(range(3))
    start = stack.model.point_at(stack.model.tensors(), stack.full)
    teleporter = mt.GradientAscentTeleporter(
        steps=400,
        step_size=0.1,
        cap=1e3,
        direction=direction,
        line_search=True,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        arrived, _, _ = travel(teleporter, start, stack.symmetries)
    (matrices,) = stack.full[0]
    eigenvalues = torch.linalg.eigvalsh(matrices)
    assert start.loss is not None
    best = 2 * start.loss * eigenvalues[:, -1 if direction == "ascent" else 0]
    assert torch.allclose(arrived.squared_gradient_norm(), best, rtol=1e-6)
    assert torch.allclose(stack.model.losses_at(arrived.parameters, stack.full), start.loss, rtol=1e-10)


def ratio(**settings: object) -> float:
    problem = case("linear pair").problem()
    teleporter = mt.GradientAscentTeleporter(**settings)  # type: ignore[arg-type]
    report = mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)
    return report.gradient_norm_after / report.gradient_norm_before


def test_a_line_search_is_never_worse_than_the_start_and_finds_a_step_size() -> None:
    assert ratio(steps=6, step_size=1e-4, cap=2.0, line_search=True) > ratio(steps=6, step_size=1e-4, cap=2.0)
    # Far too long at first.
    assert ratio(steps=6, step_size=0.9, cap=3.0, line_search=True) >= 1
    assert ratio(steps=6, step_size=0.9, cap=3.0, line_search=True, direction="descent") <= 1


def test_the_cap_on_the_value_stops_the_ascent() -> None:
    problem = case("linear pair").problem()
    start = float(problem.point().squared_gradient_norm())
    assert ratio(steps=8, step_size=0.02, value_cap=0.5 * start) == 1
    one = ratio(steps=1, step_size=0.02)
    assert ratio(steps=8, step_size=0.02, value_cap=1.0001 * start) == pytest.approx(one)
    assert ratio(steps=8, step_size=0.02) > one


def test_no_gain_is_named() -> None:
    problem = case("linear pair").problem()
    teleporter = mt.GradientAscentTeleporter(steps=1, step_size=2.0, cap=2.0, direction="descent")
    report = mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)
    assert report.accepted
    assert report.gain < 0
    assert list(report.failures) == ["no gain"]
    assert f"changed by {report.gain:.1e}" in report.failures["no gain"]


def test_instability_and_drift_are_named() -> None:
    problem = case("linear pair").problem()
    for region, seen in (
        (mt.TrustRegion(max_size=0.1), "larger than 0.1"),
        (mt.TrustRegion(max_condition=1.001), "condition number is above 1.0e+00"),
    ):
        report = mt.teleport(
            problem.model, mt.RandomTeleporter(1.0, 0, trust_region=region), problem.inputs, None, problem.symmetries
        )
        assert list(report.failures) == ["unstable element"]
        assert seen in report.failures["unstable element"]
        assert not report.accepted
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    claimed = [mt.Rescaling(model, "0", "2")]
    report = mt.teleport(model, mt.RandomTeleporter(seed=0), torch.randn(6, 3).double(), None, claimed)
    assert list(report.failures) == ["unstable element"]
    assert report.failures["unstable element"] == report.reason
    assert "the outputs would change by" in report.reason


def test_a_worse_held_out_loss_is_named() -> None:
    problem = case("2022 form").problem()
    (fresh,) = case("2022 form").fresh_inputs()
    held_out = (fresh, problem.loss_of)
    report = mt.teleport(
        problem.model, mt.RandomTeleporter(0.5, 0), problem.inputs, problem.loss_of, problem.symmetries, held_out
    )
    # Exact on its batch only.
    assert report.drift < 1e-9
    assert report.held_out_drift > 1e-3
    assert ("worse held-out loss" in report.failures) == (report.held_out_after > 1.001 * report.held_out_before)
    for after, seen in ((2.0, "2 right after it, 1 before"), (math.nan, "nan right after it, 1 before")):
        assert failures_of([], held_out=(1.0, after)) == {"worse held-out loss": seen}
    for before, after in ((1.0, 0.5), (1.0, 1.0005), (math.nan, 2.0)):
        assert failures_of([], held_out=(before, after)) == {}


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"step_size": 0.0}, {"step_size": -0.1}, {"cap": 0.0}, {"direction": "sideways"}],
)
def test_bad_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"step|cap|direction"):
        mt.GradientAscentTeleporter(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["linear pair", "quadratic", "rescaling", "attention, rotary and grouped", "translations"]
)
def test_directions_on_the_group_are_those_of_the_exponential(name: str) -> None:
    problem = case(name).problem()
    for symmetry in problem.symmetries:
        group = symmetry.group
        element = group.random(size=0.5, seed=0, dtype=torch.float64)
        weights = torch.randn(group.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        step = torch.zeros(group.shape, dtype=torch.float64, requires_grad=True)
        value = (group.compose(group.exp(step), element) * weights).sum()
        (expected,) = torch.autograd.grad(value, step)
        assert torch.allclose(group.trivialised(element, weights), expected, atol=1e-12)
        small = 1e-5 * group.random_generator(seed=2, dtype=torch.float64)
        exact = group.compose(group.exp(small), element)
        assert torch.allclose(group.retract(element, small), exact, atol=1e-9)
