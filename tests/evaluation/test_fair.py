"""Fair rules: equally many trials, for the measure that is claimed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metateleport import TaskFamily, load_family
from metateleport.evaluation import (
    FAIR,
    RIVALS,
    Bench,
    Choice,
    EvaluationError,
    FairRules,
    Lattice,
    Method,
    Plan,
    Rival,
    Target,
    Trajectory,
    report_of,
    run_plan,
    target_of,
    tune_fairly,
    write_report,
)
from metateleport.evaluation.fair import goal_of, search_within
from metateleport.evaluation.pages import write_pages
from metateleport.evaluation.tuning import LARGEST
from metateleport.families import TaskStack


class Curve(Method):
    """A method whose loss falls by a rate to a floor, both given."""

    def __init__(self, lr: float, rate: float = 0.1, floor: float = 0.0) -> None:
        super().__init__("curve", {"lr": lr, "rate": rate, "floor": floor})

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        own = self.settings
        off = 1 + abs(math.log10(own["lr"] / 0.01))
        loss = own["floor"] * off + np.exp(-own["rate"] / off * np.arange(budget + 1))
        return Trajectory(np.tile(loss, (len(stack), 1)), 1.0, np.linspace(0, 1, budget + 1))


# Fast and then stuck, or slow and then lower.
CHOICES = {"rate": Choice((0.5, 0.02)), "floor": Choice((0.2, 0.0))}


@pytest.mark.parametrize("trials", [1, 3, 12, 40])
@pytest.mark.parametrize("choices", [{}, CHOICES], ids=["step size", "choices"])
def test_every_trial_is_spent_and_none_twice(trials: int, choices: dict[str, Choice]) -> None:
    rival = Rival("curve", Curve, Lattice(-4, -1), choices)
    tried = search_within(rival, lambda settings: abs(math.log10(settings["lr"])), trials)
    assert len(tried) == trials
    assert len({str(settings) for settings, _ in tried}) == trials


def test_all_rivals_have_equally_many_trials(tmp_path: Path) -> None:
    family = load_family("lora_digits", {"width": 6, "depth": 2, "rank": 2, "samples": 60, "batch": 20})
    rules = FairRules(trials=2, tasks=2)
    for name in ("adamw", "muon", "lora-rite"):
        pytest.importorskip(RIVALS[name].library or "torch")
        tuning = tune_fairly(RIVALS[name], family, 3, rules, cache=tmp_path).tuning
        assert tuning is not None
        assert (len(tuning["tried"]), tuning["trials"], tuning["rivals"], tuning["tasks"]) == (2, 2, "fair", 2)


def test_the_search_finds_settings_that_are_worth_trials() -> None:
    def value(settings: dict[str, Any]) -> float:
        best = {"a": 1e-3, "b": 3e-2}[settings["kind"]]
        return abs(math.log10(settings["lr"] / best)) + 2 * (settings["kind"] == "a")

    rival = Rival("bowl", Curve, Lattice(-4, -1), {"kind": Choice(("a", "b"))})
    chosen, found = min(search_within(rival, value, 12), key=lambda each: each[1])
    assert chosen["kind"] == "b"
    assert found < 0.2


def test_what_is_measured_decides(family: TaskFamily, tmp_path: Path) -> None:
    rival = Rival("curve", lambda lr, kind: Curve(lr, *kind), choices={"kind": Choice(((0.5, 0.2), (0.02, 0.0)))})
    end = tune_fairly(rival, family, 300, FairRules(trials=12), cache=tmp_path)
    assert end.settings["rate"] == 0.02
    rules = FairRules(trials=12, measure="target", target="adamw@10")
    soon = tune_fairly(rival, family, 300, rules, [0.5] * 8, cache=tmp_path)
    assert soon.settings["rate"] == 0.5
    low = tune_fairly(rival, family, 300, rules, [0.1] * 8, cache=tmp_path)
    assert low.settings["rate"] == 0.02, "the other never gets there"


def test_results_are_remembered_and_the_key_sees_the_rules(family: TaskFamily, tmp_path: Path) -> None:
    rival = Rival("curve", Curve, Lattice(-4, -1))
    goal = [0.5] * 8

    def cached(rules: FairRules, goal: list[float] | None = None) -> bool:
        tuning = tune_fairly(rival, family, 20, rules, goal, cache=tmp_path).tuning
        assert tuning is not None
        return bool(tuning["cached"])

    assert not cached(FairRules())
    assert cached(FairRules())
    assert not cached(FairRules(trials=6))
    assert not cached(FairRules(tasks=4))
    assert not cached(FairRules(measure="target", target="adamw@20"), goal)
    assert cached(FairRules(measure="target", target="adamw@20"), goal)
    assert not cached(FairRules(measure="target", target="adamw@20"), [0.4] * 8)
    assert not cached(FairRules(measure="seconds", target="adamw@20"), goal)


def test_an_interrupted_search_goes_on(family: TaskFamily, tmp_path: Path) -> None:
    made: list[float] = []

    def make(lr: float) -> Method:
        made.append(lr)
        if len(made) == 4:
            raise KeyboardInterrupt
        return Curve(lr)

    rival = Rival("curve", make, Lattice(-4, -1))
    with pytest.raises(KeyboardInterrupt):
        tune_fairly(rival, family, 5, FairRules(trials=6), cache=tmp_path)
    tune_fairly(rival, family, 5, FairRules(trials=6), cache=tmp_path)
    assert len(made) == 4 + 3 + 1, "three trials were kept; the method itself is made once more"


def test_tuning_for_a_target_needs_the_goal(family: TaskFamily) -> None:
    with pytest.raises(ValueError, match="goal"):
        tune_fairly(RIVALS["adamw"], family, 3, FairRules(measure="target", target="adamw@3"))


def test_tasks_without_held_out_data_cannot_be_tuned_for_them(family: TaskFamily, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no held-out data"):
        tune_fairly(RIVALS["adamw"], family, 3, FairRules(measure="held-out"), cache=tmp_path)


def test_a_goal_is_the_loss_on_the_tasks_of_tuning(family: TaskFamily) -> None:
    method = RIVALS["adamw"].make(lr=1e-2)
    goal = goal_of(method, family, 6, 4, FairRules(tasks=3))
    stack = family.stack(range(3), "train")
    np.testing.assert_allclose(goal, method.run(stack, 6).loss[:, 4])
    assert goal_of(RIVALS["gd"].make(lr=1e9), family, 6, 6, FairRules(tasks=3)) == [LARGEST] * 3


def test_fair_methods_are_those_that_suit_the_tasks() -> None:
    plain = Bench(Plan("leaky_mlp", {"width": 4}, rules=FairRules()))
    assert set(plain.rivals) == {name for name, rival in FAIR.items() if not rival.needs}
    adapted = Bench(Plan("lora_digits", {"width": 4, "depth": 2, "samples": 60, "batch": 10}, rules=FairRules()))
    assert set(adapted.rivals) == set(FAIR)
    with pytest.raises(EvaluationError, match=r"lora\+ needs tasks with a symmetry of the kind 'LoRA pair'"):
        Bench(Plan("leaky_mlp", {"width": 4}, methods=("lora+",)))


def test_an_evaluation_under_fair_rules_says_so() -> None:
    rules = FairRules(trials=2, measure="target", target="adamw@4", tasks=2)
    plan = Plan("leaky_mlp", {"width": 4}, methods=("adamw", "muon"), tasks=2, steps=4, rules=rules)
    bench = Bench(plan)
    assert bench.names == ["adamw/end", "adamw", "muon"]
    evaluation = run_plan(bench)
    report = report_of(evaluation, against="muon")
    assert report["rules"]["rivals"] == "fair"
    assert (report["rules"]["trials"], report["rules"]["measure"]) == (2, "target")
    assert report["methods"]["muon"]["tuning"]["measure"] == "target"
    assert report["methods"]["adamw/end"]["tuning"]["measure"] == "end"
    judged = Bench(Plan("digits", {"hidden": 3, "samples": 20, "batch": 10}, methods=("adamw",), steps=4, rules=rules))
    tuned = judged._method(judged.units[0], lambda _: None)
    assert tuned.name == "adamw/end"
    assert tuned.tuning is not None
    assert tuned.tuning["measure"] == "held-out", "where there are held-out data"
    assert set(report["against"]["others"]) == {"adamw/end", "adamw"}
    assert target_of(evaluation, Target("adamw/end", 4))["methods"]["adamw/end"]["evaluations"] <= 4


def test_pages_say_which_rules_and_which_methods_step_task_by_task(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    plan = Plan("leaky_mlp", {"width": 4}, methods=("adamw", "muon", "soap"), tasks=2, steps=4)
    texts = {}
    for name, rules in (("fair", FairRules(trials=2, tasks=2)), ("library", None)):
        rival = dataclasses.replace(plan, rules=rules, methods=plan.methods if rules else ("gd",))
        report = report_of(run_plan(Bench(rival)), "muon" if rules else None)
        write_report(tmp_path / f"{name}.json", report)
        write_pages(tmp_path / name, [], [tmp_path / f"{name}.json"])
        texts[name] = (tmp_path / name / "none.md").read_text()
    assert "Rivals under fair rules: 2 trials each on 2 training tasks" in texts["fair"]
    assert "- muon: lr=" in texts["fair"]
    assert "training loss over that of muon at" in texts["fair"]
    assert texts["fair"].count("task by task") == 2, "beside its seconds, and in place of a ratio at equal seconds"
    assert "until the best of its grid lies inside" in texts["library"]
    assert "fair rules: " not in texts["library"]
