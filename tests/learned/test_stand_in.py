"""The stand-in for a loss that is not told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from metateleport.learned.stand_in import StandIn
from metateleport.point import Point


def descend(curvature: Tensor, steps: int, noise: float = 0.0, scale: float = 1.0, factor: float = 1.0) -> list[float]:
    """Polyak's steps on a parabola with the stand-in in the loss's place; the losses seen."""
    source = torch.Generator().manual_seed(0)
    x = torch.ones(1, len(curvature), dtype=torch.float64)
    stand_in, losses = None, []
    for _ in range(steps):
        gradient = scale * (curvature * x + noise * torch.randn(x.shape, generator=source, dtype=x.dtype))
        point = Point({"x": x}, {"x": gradient}, loss=x.new_ones(1))
        stand_in = StandIn.begin(point) if stand_in is None else stand_in.seen(point.gradients)
        losses.append(float((curvature * x.square()).sum() / 2))
        moved = x - (stand_in.value({"x": gradient}) / gradient.square().sum()) * gradient
        stand_in = stand_in.stepped({"x": x}, {"x": moved}, {"x": gradient})
        stand_in = dataclasses.replace(stand_in, factor=factor)
        x = x + factor * (moved - x)
    return losses


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_it_finds_the_length_of_a_step_whatever_the_curvature(size: float) -> None:
    losses = descend(size * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), 60)
    assert losses[-1] < 1e-12 * losses[0]


def test_a_scaled_loss_changes_no_step() -> None:
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for scale in (2.0**10, 2.0**-10):
        assert descend(curvature, 20, scale=scale) == pytest.approx(descend(curvature, 20), rel=1e-9)


def test_with_noise_it_settles_and_does_not_vanish() -> None:
    curvature = torch.ones(20, dtype=torch.float64)
    losses = descend(curvature, 400, noise=0.3)
    late = sum(losses[-100:]) / 100
    assert late < 0.01 * losses[0]
    assert len({round(each, 12) for each in losses[-20:]}) == 20


def test_a_factor_on_the_steps_is_not_made_up_for() -> None:
    curvature = torch.ones(4, dtype=torch.float64)
    whole, tenth = descend(curvature, 15), descend(curvature, 15, factor=0.1)
    assert whole[-1] < 1e-2 * tenth[-1]
    assert tenth[-1] < tenth[0]


def test_gradients_of_other_tensors_than_the_last_step_moved_tell_nothing() -> None:
    point = Point({"a": torch.ones(1, 2)}, {"a": torch.ones(1, 2)}, loss=torch.ones(1))
    stand_in = StandIn.begin(point).stepped({"a": torch.ones(1, 2)}, {"a": torch.zeros(1, 2)}, {"a": torch.ones(1, 2)})
    after = stand_in.seen({"b": torch.ones(1, 3)})
    assert bool(after.length.isfinite())


def test_gradients_of_zero_leave_a_finite_stand_in() -> None:
    point = Point({"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 2)}, loss=torch.ones(1))
    stand_in = StandIn.begin(point)
    assert bool(stand_in.value(point.gradients) > 0)
    same = stand_in.stepped(point.parameters, point.parameters, point.gradients).seen(point.gradients)
    assert bool(same.length == stand_in.length)


def begun() -> StandIn:
    """A stand-in after a step of minus one along each of two weights, at a gradient of one."""
    weights, gradients = {"a": torch.ones(1, 2)}, {"a": torch.ones(1, 2)}
    stand_in = StandIn.begin(Point(weights, gradients, loss=torch.ones(1)))
    return stand_in.stepped(weights, {"a": torch.zeros(1, 2)}, gradients)


@pytest.mark.parametrize("factor", [0.1, 0.5])
@pytest.mark.parametrize("end", [0.8, -0.5, 0.0])
def test_a_part_of_a_step_tells_what_the_whole_one_would(end: float, factor: float) -> None:
    """Along a parabola a gradient that is `end` at the end of the step is so far from one after a part of it."""
    whole = begun().seen({"a": torch.full((1, 2), end)})
    part = dataclasses.replace(begun(), factor=factor).seen({"a": torch.full((1, 2), 1 + factor * (end - 1))})
    torch.testing.assert_close(part.length, whole.length)


def test_a_step_that_was_not_taken_tells_nothing() -> None:
    still = dataclasses.replace(begun(), factor=0.0)
    assert still.seen({"a": torch.full((1, 2), -5.0)}) is still


def test_a_step_uphill_tells_nothing() -> None:
    weights, gradients = {"a": torch.ones(1, 2)}, {"a": torch.ones(1, 2)}
    uphill = begun().stepped(weights, {"a": torch.full((1, 2), 2.0)}, gradients)
    for end in (-3.0, 3.0):
        assert torch.equal(uphill.seen({"a": torch.full((1, 2), end)}).length, uphill.length)


def test_a_step_that_led_out_of_the_finite_was_too_long() -> None:
    after = begun().seen({"a": torch.full((1, 2), -3e38)})
    assert bool(after.length.isfinite())
    assert float(after.length) < float(begun().length)


def test_weights_that_start_at_zero_are_stepped() -> None:
    point = Point({"a": torch.zeros(1, 4)}, {"a": torch.full((1, 4), 3.0)}, loss=torch.ones(1))
    step = StandIn.begin(point).value(point.gradients) / point.gradients["a"].norm()
    assert float(step) == pytest.approx(0.02 * 0.01 * 4**0.5)
