"""The curriculum over length: each stack has a length of its own, and scores are means over all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import metateleport as mt
from metateleport.learned import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.training import scoring
from metateleport.training.distributed import ALONE, Ranks
from metateleport.training.outer import EvolutionSettings, PersistentSettings, TruncatedSettings
from metateleport.training.particles import Particles
from metateleport.training.recipe import Recipe
from metateleport.training.scoring import dealt
from metateleport.training.trainer import MetaTrainer
from metateleport.training.unroll import Unroll

SETTINGS = {"width": 6, "rank": 2, "batch": 20}
OUTER = {"estimator": "es", "meta_steps": 8, "tasks": 2, "horizon": 12, "shortest": 3, "told": True, "spread": 0.1}


def recipe(**outer: Any) -> Recipe:
    return Recipe.read(
        {
            "family": {"name": "matrix_factorisation", **SETTINGS},
            "rule": {"kind": "static"},
            "outer": {**OUTER, **outer},
            "validation": {"tasks": 8, "every": 8},
        }
    )


def trainer(made: Recipe) -> MetaTrainer:
    torch.manual_seed(0)
    return MetaTrainer(made, mt.load_family("matrix_factorisation", SETTINGS), MetaOptimizer(made.networks(("GL",))))


def test_lengths_grow_and_are_spread_evenly_in_their_logarithm() -> None:
    outer = EvolutionSettings(horizon=500, shortest=20)
    assert {outer.length(stack, 0.0) for stack in range(50)} == {20}
    for share, longest in ((0.25, 100), (0.5, 500), (1.0, 500)):
        logs = sorted(math.log(outer.length(stack, share) / 20) / math.log(longest / 20) for stack in range(100))
        assert 0 <= logs[0] < 0.1
        assert 0.9 < logs[-1] <= 1
        # Even: the largest distance from the straight line is a few steps of it.
        assert max(abs(value - (place + 0.5) / 100) for place, value in enumerate(logs)) < 0.04


def test_without_a_shortest_run_all_are_as_long_as_the_horizon() -> None:
    for outer in (EvolutionSettings(horizon=40), PersistentSettings(horizon=40), TruncatedSettings(horizon=40)):
        assert [outer.scored(stack, 5, 40) for stack in range(5)] == [40] * 5
        assert [outer.length(stack, 1.0) for stack in range(5)] == [40] * 5


def test_a_shortest_run_above_the_horizon_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"outer\.shortest = 13 is longer than outer\.horizon = 12"):
        recipe(shortest=13)
    with pytest.raises(SettingsError, match="goes with 'es'"):
        recipe(estimator="pes", unroll=3)


def test_each_stack_is_followed_for_its_length_and_told_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe()
    followed: list[tuple[int, int | None, int]] = []
    window = Particles.window

    def spied(self: Particles, steps: int, weights: Any, known: bool = True, last: int | None = None) -> Any:
        followed.append((steps, self._unrolls[0].total, last or 0))
        return window(self, steps, weights, known, last)

    monkeypatch.setattr(Particles, "window", spied)
    trainer(made).run()
    lengths = [made.outer.length(stack, stack / 8) for stack in range(8)]
    told = [made.outer.total(stack, length) for stack, length in enumerate(lengths)]
    assert followed == [(length, own, length) for length, own in zip(lengths, told, strict=True)]
    assert len(set(lengths)) > 3


def test_scores_are_means_over_lengths_from_the_shortest_to_the_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None]] = []
    window = Unroll.window

    def spied(self: Unroll, steps: int, *given: Any, **named: Any) -> Any:
        seen.append((steps, self.total))
        return window(self, steps, *given, **named)

    monkeypatch.setattr(scoring.Unroll, "window", spied)
    made = recipe()
    trainer(made).validation_score()
    assert [steps for steps, _ in seen] == [3, 5, 8, 12]
    assert all(steps == told for steps, told in seen)
    # Where there is no time for the horizon, or for a second stack.
    assert [made.outer.scored(stack, 2, 6) for stack in range(2)] == [3, 6]
    assert made.outer.scored(0, 1, 12) == 12


def test_processes_follow_the_same_stacks_for_the_same_lengths() -> None:
    family, outer = mt.load_family("matrix_factorisation", SETTINGS), recipe().outer
    alone = {number for number, _ in dealt(family, outer, 8, 4, 0, "validation", (0, 0), ALONE)}
    shared = [
        {
            number
            for number, _ in dealt(family, outer, 8, 4, 0, "validation", (0, 0), Ranks(rank, 2, torch.device("cpu")))
        }
        for rank in (0, 1)
    ]
    assert alone == {0, 1, 2, 3}
    assert shared == [{0, 1}, {2, 3}]
