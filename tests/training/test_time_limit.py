"""Seconds bound a training with its validations, however long its horizon is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_cases import small, trainer

import metateleport as mt
from metateleport.training import MetaTrainer, train
from metateleport.training.unroll import Unroll

STEP = 0.02


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Callable[[], float]]:
    """The inner steps that are taken, and a clock by which each takes a fiftieth of a second."""
    steps, own = [0], Unroll.window

    def window(self: Unroll, length: int, *rest: bool, **named: bool) -> object:
        steps[0] += length
        return own(self, length, *rest, **named)

    monkeypatch.setattr(Unroll, "window", window)
    return steps, lambda: steps[0] * STEP


SLOW = pytest.mark.slow(seconds=5)


def timed(monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[MetaTrainer, list[int]]:
    steps, clock = counted(monkeypatch)
    found = trainer(small(mode="lr", meta_steps=None, validation_tasks=2, **changes))
    found.clock = clock
    return found, steps


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=SLOW), {"search": 2}, pytest.param({"starts": 2}, marks=SLOW)],
    ids=["plain", "search", "starts"],
)
def test_a_huge_horizon_ends_in_time(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found, steps = timed(monkeypatch, horizon=10**8, seconds=8.0, **changes)
    found.run()
    assert steps[0] * STEP < 8.0 * 1.25
    done = found.progression
    assert done.meta_step >= 6
    assert 3 <= done.scored_steps < 10**4
    assert done.validations[-1][0] == done.meta_step
    # All scores are along the same number of steps, so that they can be compared.
    assert len(done.validations) > 1


def test_a_horizon_that_there_is_time_for_is_followed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found, steps = timed(monkeypatch, seconds=2.0)
    found.run()
    assert found.progression.scored_steps == found.outer.horizon
    assert steps[0] * STEP < 2.0 * 1.2
    score = found.progression.validations[-1][1]
    assert found.validation_score() == score


def test_validations_take_a_small_share_of_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, seconds=8.0, validation_every=1)
    found.run()
    done, each = found.progression, found._validation_seconds
    *between, last = done.validations
    assert last[0] == done.meta_step
    assert between[0][0] == 1
    assert 2 <= len(between) < done.meta_step / 2
    assert len(between) * each <= 0.15 * done.seconds


def test_without_a_limit_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    found = trainer(small(mode="lr"))
    found.run()
    assert found.progression.scored_steps == 0
    every = found.recipe.validation.every
    assert len(found.progression.validations) >= found.progression.meta_step // every


@pytest.mark.slow(seconds=2)
def test_the_card_says_by_what_its_networks_were_chosen(tmp_path: Path) -> None:
    began = time.perf_counter()
    path = train(small(mode="lr", meta_steps=None, seconds=3.0, horizon=10**7), tmp_path / "a")
    assert time.perf_counter() - began < 60
    card = mt.load_checkpoint(path).card
    steps = card["training"]["runs"]["learned"]["validated_steps"]
    assert card["limits"] == [
        f"Its networks were chosen by validations of {steps} inner steps, and not of outer.horizon = 10000000: more "
        "would have taken too much of outer.seconds = 3."
    ]
