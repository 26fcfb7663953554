"""Gradient ascent and descent on the group element: closed forms, line search, caps, named failures."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import case
from torch import Tensor, nn

import metateleport as mt
from metateleport.objectives import Sharpness, SquaredGradientNorm
from metateleport.symmetries._rows import fitted_to, least_norm_over
from metateleport.symmetries.translation import Translation
from metateleport.teleporters import TrustRegion, failures_of, travel
from metateleport.teleporters._ascent import Ascent, Evaluate, differentiated


@pytest.mark.parametrize(("dimension", "condition"), [(4, 10.0), (10, 100.0)])
@pytest.mark.parametrize("direction", ["ascent", "descent"])
def test_on_quadratics_it_reaches_the_closed_form(dimension: int, condition: float, direction: str) -> None:
    # With y = A^1/2 x of fixed norm the squared gradient y^T A y has its extremes at the outer eigenvectors.
    stack = mt.load_family("quadratic", {"dimension": dimension, "condition": condition}).stack(range(3))
    start = stack.point_at(stack.tensors(), stack.full)
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
    assert torch.allclose(stack.losses_at(arrived.parameters, stack.full), start.loss, rtol=1e-10)


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
        (TrustRegion(max_size=0.1), "larger than 0.1"),
        (TrustRegion(max_condition=1.001), "condition number is above 1.0e+00"),
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


class Counted:
    """An objective with its slope, and how often each of them was asked for."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate, self.sloped, self.plain = evaluate, 0, 0

    def __call__(self, element: Tensor, sloped: bool) -> tuple[Tensor, Tensor | None]:
        self.sloped, self.plain = self.sloped + sloped, self.plain + (not sloped)
        return self.evaluate(element, sloped)


LINE = Translation(1)


def hill(scale: Tensor) -> Counted:
    """Straight lines of some slopes, a task each."""
    return Counted(differentiated(LINE, lambda x: scale * x[..., 0]))


def run(scale: list[float], **settings: object) -> tuple[list[float], list[float], Counted]:
    counted = hill(torch.tensor(scale, dtype=torch.float64))
    ascent = Ascent(**{"steps": 10, "step_size": 0.1, "cap": 10.0, **settings})  # type: ignore[arg-type]
    arrived = ascent.run(LINE, torch.zeros(len(scale), 1, dtype=torch.float64), counted)
    return arrived.element[:, 0].tolist(), arrived.spent.tolist(), counted


@pytest.mark.parametrize(("cap", "steps"), [(0.3, 3), (0.25, 3), (0.1, 1), (0.05, 1), (10.0, 10), (math.inf, 10)])
def test_an_ascent_is_over_at_its_cap(cap: float, steps: int) -> None:
    (place,), (spent,), counted = run([2.0], cap=cap)
    assert place == pytest.approx(min(cap, 1.0))
    # A third tenth may end just below 0.3.
    assert steps <= spent <= steps + (cap == 0.3)
    assert (counted.sloped, counted.plain) == (spent, 0)


def test_each_task_is_charged_what_it_would_cost_alone() -> None:
    def bowls(*tasks: tuple[float, float]) -> Counted:
        heights, curves = torch.tensor(tasks, dtype=torch.float64).unbind(-1)
        return Counted(differentiated(LINE, lambda x: heights - curves * (x[..., 0] - 1).square()))

    # Above the cap on the value, on its way for long, level, not a number.
    tasks = [(5.0, 1.0), (1.0, 1.0), (3.0, 0.0), (1.0, math.nan)]
    ascent = Ascent(6, 0.1, 0.35, value_cap=3.5)
    together = bowls(*tasks)
    stacked = ascent.run(LINE, torch.zeros(4, 1, dtype=torch.float64), together)
    spent = []
    for task, each in enumerate(tasks):
        counted = bowls(each)
        alone = ascent.run(LINE, torch.zeros(1, 1, dtype=torch.float64), counted)
        assert torch.equal(alone.element[0].nan_to_num(), stacked.element[task].nan_to_num())
        assert alone.spent.tolist() == [counted.sloped] == [float(stacked.spent[task])]
        spent.append(counted.sloped)
    assert spent == [1, 5, 1, 1]
    assert together.sloped == 5


@pytest.mark.parametrize("cap", [0.35, 100.0])
def test_a_line_search_is_charged_its_values_and_ends_too(cap: float) -> None:
    (place,), (spent,), counted = run([1.0], cap=cap, line_search=True, steps=3)
    # Four times the step of 0.1 is beyond the near cap at once.
    assert (counted.sloped, counted.plain) == ((1, 5) if cap == 0.35 else (3, 15))
    assert spent == pytest.approx(counted.sloped + counted.plain / 3)
    assert place == pytest.approx(min(cap, 0.4 + 1.6 + 6.4))
    _, (level,), counted = run([0.0], line_search=True)
    assert (level, counted.sloped, counted.plain) == (1, 1, 0)


def test_a_teleport_is_charged_for_the_steps_that_were_made() -> None:
    problem = case("2022 form").problem()

    def spent(**settings: object) -> float:
        teleporter = mt.GradientAscentTeleporter(steps=8, step_size=0.02, **settings)  # type: ignore[arg-type]
        with torch.no_grad():
            _, (move,), _ = travel(teleporter, problem.point(), problem.symmetries)
        return float(move.evaluations)

    # A third of an evaluation rebuilds the gradient, and three times that is one step.
    assert spent() == pytest.approx(8 + 1 / 3)
    assert spent(cap=0.02) == pytest.approx(1 + 1 / 3)
    assert spent(value_cap=0.0) == pytest.approx(1)


def test_a_gain_that_nobody_looks_at_is_not_charged() -> None:
    problem = case("linear pair").problem()
    sharpness = Sharpness(radii=(0.1,), directions=3)
    for region, looks in ((TrustRegion(), 2.0), (TrustRegion(max_size=1e-9), 0.0)):
        teleporter = mt.GradientAscentTeleporter(sharpness, steps=2, step_size=0.01, trust_region=region)
        with torch.no_grad():
            _, (move,), _ = travel(teleporter, problem.point(), problem.symmetries)
        assert float(move.evaluations) == pytest.approx(2 * 3 + looks)
    stacked, batch = case("linear pair").stack(2)
    start = stacked.point_at(stacked.tensors(), batch)
    teleporter = mt.GradientAscentTeleporter(sharpness, steps=2, step_size=0.01)
    with torch.no_grad():
        _, (move,), _ = travel(teleporter, start, stacked.symmetries, allowed=torch.tensor([True, False]))
    assert move.evaluations.tolist() == pytest.approx([2 * 3 + 2, 2 * 3])


@pytest.mark.parametrize("name", ["2024 form", "2024 form, samples at width", "chain of 2024 forms"])
def test_the_slope_of_a_trial_is_that_of_the_action(name: str) -> None:
    problem = case(name).problem()
    point = problem.point()
    start = point.detach().replace(pullback=point.pullback)
    norm = SquaredGradientNorm()
    for symmetry in problem.symmetries:
        element = symmetry.group.random(size=0.5, seed=1, dtype=torch.float64)
        trial = symmetry.action_at(start, gradients_only=True)
        expected, slope = differentiated(symmetry.group, lambda g, s=symmetry: norm(s.act(g, start)))(element, True)
        found, found_slope = differentiated(symmetry.group, lambda g, t=trial: norm(t(g)))(element, True)
        assert torch.allclose(found, expected, rtol=1e-10)
        assert slope is not None
        assert found_slope is not None
        assert torch.allclose(found_slope, slope, rtol=0, atol=1e-9 * float(slope.abs().max()))


@pytest.mark.parametrize("samples", [3, 5])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 1e-10, 0.0])
def test_fitted_covectors_are_those_of_the_least_norm_step(samples: int, smallest: float) -> None:
    """Where half of the digits are lost by a Gram matrix and where the rows of one task are dependent, too."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    old, covectors, weights = draw(2, samples, 5), draw(2, 4, 5), draw(2, 4, 5)
    rows = draw(2, samples, 5)
    rows[0, 0] = smallest * rows[0, 0] + (rows[0, 1] if smallest else 0.0)
    answers = []
    for fit in (
        lambda new: covectors + (least_norm_over(new)((old - new) @ covectors.mT)).mT,
        fitted_to(old, covectors),
    ):
        new = rows.clone().requires_grad_()
        found = fit(new)
        (slope,) = torch.autograd.grad((found * weights).sum(), new)
        answers.append((found.detach(), slope))
    for expected, found in zip(*answers, strict=True):
        for task, lost in enumerate((smallest, 1.0)):
            # The slope loses twice the digits that the rows do.
            tolerance = 1e-12 / max(lost, 1e-10) ** 2 if lost else 1e-12
            scale = float(expected[task].abs().max())
            assert torch.allclose(found[task], expected[task], rtol=0, atol=min(tolerance, 1e-2) * scale + 1e-12)
