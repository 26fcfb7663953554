"""How rivals are tuned: the grid, the choices, what is remembered."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from metateleport import TaskFamily, load_family
from metateleport.evaluation import (
    BASELINES,
    Choice,
    Lattice,
    Method,
    Rival,
    Trajectory,
    evaluate,
    tune,
)
from metateleport.evaluation.tuning import score, search
from metateleport.families import TaskStack


class Bowl(Method):
    """A method whose score is known: best at `best`, worse by the distance in the logarithm."""

    def __init__(self, lr: float, best: float, penalty: float = 0.0) -> None:
        super().__init__("bowl", {"lr": lr})
        self.loss = math.exp(abs(math.log10(lr / best)) + penalty)

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        return Trajectory(np.full((len(stack), budget + 1), self.loss), 0.0, np.zeros(budget + 1))


class TestTuning:
    @pytest.mark.parametrize("best", [1e-9, 3e-4, 0.2, 5e4])
    def test_the_grid_goes_on_until_the_best_lies_inside(self, best: float) -> None:
        rival = Rival("bowl", lambda lr: Bowl(lr, best), Lattice(-3, 1))
        tried = {s["lr"]: v for s, v in search(rival, lambda s: math.log(Bowl(best=best, **s).loss))}
        chosen = min(tried, key=lambda lr: tried[lr])
        assert abs(math.log10(chosen / best)) <= 0.126
        places = sorted(tried)
        assert 0 < places.index(chosen) < len(places) - 1
        # Its neighbours on the fine grid were tried.
        for factor in (10**0.25, 10**-0.25):
            assert any(abs(math.log10(place / (chosen * factor))) < 1e-4 for place in places)

    def test_a_choice_is_compared_at_a_step_size_of_its_own(self) -> None:
        def value(settings: dict[str, object]) -> float:
            best, penalty = {"a": (1.0, 0.5), "b": (1e-2, 0.0)}[str(settings["kind"])]
            return math.log(Bowl(float(str(settings["lr"])), best, penalty).loss)

        rival = Rival("bowl", lambda **_: Bowl(1, 1), Lattice(-1, 1), {"kind": Choice(("a", "b"))})
        chosen, _ = min(search(rival, value), key=lambda each: each[1])
        assert chosen == {"lr": 0.01, "kind": "b"}

    def test_what_diverges_scores_worst(self) -> None:
        assert score([1.0, math.nan]) == score([1.0, math.inf]) > score([1.0, 1e200])

    def test_it_is_remembered_and_the_key_sees_what_matters(self, family: TaskFamily, tmp_path: Path) -> None:
        made = []

        def make(lr: float) -> Method:
            made.append(lr)
            return Bowl(lr, 1e-3)

        rival = Rival("bowl", make, tasks=2)
        first = tune(rival, family, 3, cache=tmp_path)
        assert first.tuning is not None
        assert not first.tuning["cached"]
        tries = len(made)
        again = tune(rival, family, 3, cache=tmp_path)
        assert again.tuning is not None
        assert again.tuning["cached"]
        assert len(made) == tries + 1
        assert again.settings == first.settings
        for other in (
            lambda: tune(rival, family, 4, cache=tmp_path),
            lambda: tune(rival, family, 3, torch.float32, cache=tmp_path),
            lambda: tune(rival, load_family("leaky_mlp", {"width": 6}), 3, cache=tmp_path),
        ):
            tuning = other().tuning
            assert tuning is not None
            assert not tuning["cached"]

    def test_a_damaged_memory_is_made_anew(self, family: TaskFamily, tmp_path: Path) -> None:
        rival = Rival("bowl", lambda lr: Bowl(lr, 1e-3), tasks=2)
        tune(rival, family, 3, cache=tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_text(file.read_text()[:40])
        tuning = tune(rival, family, 3, cache=tmp_path).tuning
        assert tuning is not None
        assert not tuning["cached"]

    def test_it_tunes_on_training_tasks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        family = load_family("leaky_mlp", {"width": 4})
        splits = []
        original = type(family).stack
        monkeypatch.setattr(
            type(family),
            "stack",
            lambda self, indices, split, *rest: splits.append(split) or original(self, indices, split, *rest),
        )
        method = tune(Rival("gd", BASELINES["gd"].make, tasks=2), family, 3, cache=tmp_path)
        evaluate(family, [method], tasks=2, steps=3)
        assert splits == ["train", "held-out"]
