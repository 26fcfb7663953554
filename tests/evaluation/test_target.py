"""Evaluations and seconds to a target: counted from the first time there, censored as stated, paired task by task."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import numpy.typing as npt
import pytest

from metateleport.evaluation import Evaluation, EvaluationError, Result, SeedResults, Target, Trajectory, target_of
from metateleport.evaluation.target import evaluations_to

TASKS, STEPS = 24, 40
STARTS = np.exp(np.random.default_rng(0).normal(size=(TASKS, 1)))


def falling(rate: float, speed: float = 1.0, floor: float = 0.0, right: float | None = None) -> Result:
    """Loss that falls by `rate` at each evaluation, the same share in every task, down to a floor."""
    loss = STARTS * np.maximum(rate ** np.arange(STEPS + 1), floor)
    accuracy = None if right is None else np.full(loss.shape, right) + 0.001 * np.arange(STEPS + 1)
    along = np.arange(STEPS + 1) / speed
    return Result(Trajectory(loss, along[-1], along, None, accuracy), False, {}, None)


def evaluation(**results: Result) -> Evaluation:
    named = {name.replace("__", "/"): each for name, each in results.items()}
    return Evaluation("line", {}, "some", TASKS, STEPS, 0, "float64", "cpu", named)


class TestEvaluationsTo:
    def test_the_first_time_counts_though_the_loss_rises_again(self) -> None:
        assert evaluations_to([[5.0, 2.0, 4.0]], [2.0]).tolist() == [1.0]

    def test_what_is_not_a_number_is_not_there(self) -> None:
        assert evaluations_to([[5.0, np.nan, 4.0], [5.0, np.nan, 1.0]], [2.0, 2.0]).tolist() == [np.inf, 2.0]

    def test_a_goal_is_each_tasks_own(self) -> None:
        assert evaluations_to([[3.0, 2.0, 1.0]] * 2, [2.0, 1.0]).tolist() == [1.0, 2.0]


class TestTarget:
    def test_twice_as_fast_is_a_ratio_of_two(self) -> None:
        found = target_of(evaluation(learned=falling(0.25), adam=falling(0.5)), Target("adam", 20))
        assert found["methods"]["learned"]["evaluations"] == 10
        assert found["methods"]["adam"]["evaluations"] == 20
        ratio = found["ratios_to_learned"]["adam"]["evaluations"]
        assert ratio["ratio"] == pytest.approx(2.0)
        assert ratio["low"] == pytest.approx(2.0)

    def test_seconds_are_those_at_the_evaluation(self) -> None:
        found = target_of(evaluation(learned=falling(0.25, speed=0.1), adam=falling(0.5)), Target("adam", 20))
        assert found["methods"]["learned"]["seconds"] == pytest.approx(100.0)
        assert found["ratios_to_learned"]["adam"]["seconds"]["ratio"] == pytest.approx(0.2)

    def test_the_targets_own_method_may_be_there_before(self) -> None:
        level = falling(0.5, floor=0.5**10)
        found = target_of(evaluation(learned=falling(0.5), adam=level), Target("adam", 30))
        assert found["methods"]["adam"]["evaluations"] == 10
        assert found["ratios_to_learned"]["adam"]["evaluations"]["ratio"] == pytest.approx(1.0)

    def test_a_learned_run_that_never_gets_there_is_worse_than_any(self) -> None:
        found = target_of(evaluation(learned=falling(0.9), adam=falling(0.5)), Target("adam", STEPS))
        assert found["methods"]["learned"]["censored"] == TASKS
        for what in ("evaluations", "seconds"):
            assert found["ratios_to_learned"]["adam"][what]["high"] < 1e-6

    def test_of_another_that_never_gets_there_the_budget_counts(self) -> None:
        results = {"learned": falling(0.25), "adam": falling(0.5), "gd": falling(0.9)}
        entry = target_of(evaluation(**results), Target("adam", 20))["ratios_to_learned"]["gd"]
        assert entry["evaluations"]["ratio"] == pytest.approx(STEPS / 10)

    def test_two_that_never_get_there_are_alike(self) -> None:
        results = {"learned": falling(0.9), "adam": falling(0.5), "gd": falling(0.95)}
        entry = target_of(evaluation(**results), Target("adam", STEPS))["ratios_to_learned"]["gd"]
        assert entry["evaluations"]["ratio"] == 1.0
        assert entry["seconds"]["ratio"] == 1.0

    def test_accuracy_is_compared_where_each_is_there(self) -> None:
        results = {"learned": falling(0.25, right=0.5), "adam": falling(0.5, right=0.5)}
        entry = target_of(evaluation(**results), Target("adam", 20))["ratios_to_learned"]["adam"]
        assert entry["held_out_accuracy"]["difference"] == pytest.approx(-0.01)

    def test_the_loss_with_the_accuracy_is_reached_when_both_are(self) -> None:
        """It grows by a thousandth an evaluation, and the learned one is a hundredth short at half of them."""
        results = {
            "learned": falling(0.25, right=0.495),
            "adam": falling(0.5, right=0.5),
            "gd": falling(0.9, right=0.4),
        }
        found = target_of(evaluation(**results), Target("adam", 20))
        assert found["methods"]["learned"]["evaluations"] == 10
        both = found["and_accuracy"]
        assert {name: each["evaluations"] for name, each in both["methods"].items()} == {
            "learned": 25,
            "adam": 20,
            "gd": STEPS,
        }
        assert both["methods"]["gd"]["censored"] == TASKS
        assert both["ratios_to_learned"]["adam"]["evaluations"]["ratio"] == pytest.approx(0.8)
        assert "and the held-out accuracy that adam has at 20: 25; others' over its own: adam 0.8" in found["in_words"]

    def test_the_loss_counts_where_the_accuracy_is_there_before_it(self) -> None:
        results = {"learned": falling(0.25, right=0.9), "adam": falling(0.5, right=0.5)}
        found = target_of(evaluation(**results), Target("adam", 20))
        assert found["and_accuracy"]["methods"] == found["methods"]

    def test_tasks_without_a_score_have_no_accuracy_to_reach(self) -> None:
        found = target_of(evaluation(learned=falling(0.25), adam=falling(0.5)), Target("adam", 20))
        assert "and_accuracy" not in found

    def test_over_meta_seeds_the_worst_is_named(self) -> None:
        seeds = ({"learned": falling(0.25)}, {"learned": falling(0.5)})
        listed = tuple(SeedResults(10 + place, 0.0, place == 0, each) for place, each in enumerate(seeds))
        whole = evaluation(learned=falling(0.25), adam=falling(0.5))
        found = target_of(dataclasses.replace(whole, meta_seeds=listed), Target("adam", 20))
        over = found["ratios_to_learned"]["adam"]["meta_seeds"]
        assert over["evaluations"]["worst"]["seed"] == 11
        assert over["evaluations"]["worst"]["ratio"] == pytest.approx(1.0)
        assert 1.0 <= over["evaluations"]["low"] <= over["evaluations"]["ratio"] <= 2.0

    def test_it_is_strict_json_with_words(self) -> None:
        results = {"learned": falling(0.9, right=0.5), "adam": falling(0.5, right=0.5)}
        found = target_of(evaluation(**results), Target("adam", STEPS))
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert "24 tasks not there" in found["in_words"]

    def test_without_a_learned_method_the_numbers_stand_alone(self) -> None:
        found = target_of(evaluation(adam=falling(0.5)), Target("adam", 20))
        assert set(found) == {"target", "goal", "methods"}

    @pytest.mark.parametrize("text", ["adam", "adam@", "@30", "adam@0", "adam@-3", "adam@many"])
    def test_what_is_no_target_is_refused(self, text: str) -> None:
        with pytest.raises(EvaluationError, match="METHOD@K"):
            Target.parse(text)

    def test_a_target_that_cannot_be_met_is_refused_before_anything_runs(self) -> None:
        with pytest.raises(EvaluationError, match="among the methods: gd"):
            Target("adam", 20).check(["gd"], 40)
        with pytest.raises(EvaluationError, match="past the budget of 40"):
            Target("adam", 50).check(["adam"], 40)


def test_a_task_that_has_diverged_sets_no_goal() -> None:
    lost = falling(0.5)
    loss: npt.NDArray[np.float64] = lost.trajectory.loss.copy()
    loss[0, 20:] = np.nan
    broken = dataclasses.replace(lost, trajectory=dataclasses.replace(lost.trajectory, loss=loss))
    found = target_of(evaluation(learned=falling(0.25), adam=broken), Target("adam", 20))
    assert found["methods"]["learned"]["censored"] == 0
