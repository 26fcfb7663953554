"""Gradient ascent along the orbit, on any objective."""

from __future__ import annotations

from typing import Any

from symmetry_cases import case
from teleporter_cases import snapshot, untouched
from torch import Tensor

import metateleport as mt
from metateleport.objectives import Objective
from metateleport.point import Point


def test_more_ascent_steps_reach_higher_and_descent_goes_down() -> None:
    def reached(**settings: Any) -> float:
        problem = case("linear pair").problem()
        teleporter = mt.GradientAscentTeleporter(**settings)
        report = mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)
        return report.gradient_norm_after / report.gradient_norm_before

    few, many = reached(steps=2, step_size=0.05), reached(steps=6, step_size=0.05)
    assert 1 < few < many
    assert reached(steps=2, step_size=0.02, direction="descent") < 1
    capped = reached(steps=6, step_size=0.05, cap=0.05)
    assert 1 < capped < many


def test_an_objective_of_ones_own_is_followed() -> None:
    class SmallSecondLayer(Objective):
        def evaluations(self, symmetry: mt.Symmetry, point: Point) -> float:
            return 0.0

        def __call__(self, point: Point) -> Tensor:
            return -point.parameters["2.weight"].square().sum()

    problem = case("rescaling").problem()
    before = float(problem.model[2].weight.detach().square().sum())  # type: ignore[index]
    teleporter = mt.GradientAscentTeleporter(SmallSecondLayer(), steps=3)
    mt.teleport(problem.model, teleporter, problem.inputs, problem.loss_of, problem.symmetries)
    assert float(problem.model[2].weight.detach().square().sum()) < before  # type: ignore[index]


def test_a_point_where_the_objective_is_flat_stays() -> None:
    problem = case("linear pair").problem()
    problem.targets = (problem.outputs(),)
    before = snapshot(problem.model)
    report = mt.teleport(
        problem.model, mt.GradientAscentTeleporter(), problem.inputs, problem.loss_of, problem.symmetries
    )
    assert report.accepted
    assert report.size == 0
    assert untouched(problem.model, before)
