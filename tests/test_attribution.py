"""Attribution: what a learned teleport brings is measured at equal cost, and said in words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from metateleport.evaluation import Evaluation, Result, Trajectory, attribution_of, report_of, words_of
from metateleport.evaluation.attribution import marks

TASKS, STEPS = 24, 20


def result(factor: float, gauge: str = "none", speed: float = 1.0, noise: float = 0.05, seed: int = 0) -> Result:
    """Loss `factor` times what every task has at its evaluation, half as much after each; one evaluation a second."""
    task = np.exp(np.random.default_rng(99).normal(size=(TASKS, 1)))
    spread = np.exp(noise * np.random.default_rng(seed).normal(size=(TASKS, 1)))
    along = 0.5 ** np.arange(STEPS + 1)
    loss = factor * task * spread * along
    seconds = np.arange(STEPS + 1) / speed
    trajectory = Trajectory(loss, float(seconds[-1]), seconds, drift_max=None if gauge == "none" else 0.0)
    return Result(trajectory, gauge != "none", {}, None, gauge)


def evaluation(**results: Result) -> Evaluation:
    named = {name.replace("__", "/").replace("_", "-"): each for name, each in results.items()}
    return Evaluation("line", {}, "some", TASKS, STEPS, 0, "float64", "cpu", named)


def found(**results: Result) -> dict[str, Any]:
    return attribution_of(evaluation(**results))["learned"]


def test_ratios_are_paired_at_equal_evaluations() -> None:
    against = found(learned=result(1.0, "stays"), learned__teleport_off=result(8.0, seed=1))["against"]
    ratios = against["learned/teleport-off"]["gradient_evaluations"]
    assert [each["at"] for each in ratios] == marks(STEPS) == [2, 6, 20]
    for each in ratios:
        assert each["low"] < 8 < each["high"] or each["ratio"] == pytest.approx(8, rel=0.05)
        # Losses differ by far more between tasks than within a pair.
        assert each["high"] / each["low"] < 1.2


def test_ratios_at_equal_seconds_know_who_is_slower() -> None:
    # The learned one takes twice as long: when the other is done, it has made half of its steps.
    slow = found(learned=result(1.0, "stays", speed=0.5), learned__teleport_off=result(1.0, noise=0.05, seed=1))
    seconds = slow["against"]["learned/teleport-off"]["seconds"]
    assert seconds["at"] == STEPS
    assert seconds["ratio"] == pytest.approx(0.5 ** (STEPS / 2), rel=0.1)
    fast = found(learned=result(1.0, "stays", speed=2.0), learned__teleport_off=result(1.0, seed=1))
    assert fast["against"]["learned/teleport-off"]["seconds"]["at"] == STEPS / 2
    assert fast["against"]["learned/teleport-off"]["seconds"]["ratio"] == pytest.approx(2 ** (STEPS / 2), rel=0.1)


@pytest.mark.parametrize(
    ("off", "alone", "verdict", "says"),
    [
        (100.0, 10.0, "helps", "divides the loss by "),
        (100.0, 1.0, "nothing", "brings nothing here"),
        (1.0, 1.0, "nothing", "brings nothing here"),
        (1.0, 100.0, "nothing", "brings nothing here"),
        (100.0, 0.1, "harms", "does harm here"),
    ],
)
def test_it_says_in_words_what_the_teleport_brings(off: float, alone: float, verdict: str, says: str) -> None:
    each = found(
        learned=result(1.0, "stays"),
        learned__teleport_off=result(off, noise=0.5, seed=1),
        learned__step_only=result(alone, seed=2),
        whitening=result(0.01, "undone", seed=3),
    )
    assert each["verdict"] == verdict
    assert says in each["in_words"]
    assert "20 gradient evaluations" in each["in_words"]
    assert "whitening by hand: 0.01" in each["in_words"] or "whitening by hand: 0.00" in each["in_words"]
    if verdict == "helps":
        # The smaller of the two merits is the teleport's.
        assert float(each["in_words"].split("loss by ")[1].split()[0]) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("gauge", "stays", "undone"),
    [("stays", 5.0, "none"), ("undone", "none", 5.0), ("both", 3.0, 2.0), ("none", "none", "none")],
)
def test_what_stays_and_what_is_undone_are_kept_apart(gauge: str, stays: Any, undone: Any) -> None:
    each = found(
        learned=result(1.0, gauge, noise=0),
        learned__teleport_off=result(5.0, noise=0),
        learned__stays_off=result(3.0, noise=0),
        learned__gauge_off=result(2.0, noise=0),
    )
    assert each["gauge"] == gauge
    for kind, expected in (("stays", stays), ("undone", undone)):
        brings = each["brings"][kind]
        ratio = brings if isinstance(brings, str) else brings["gradient_evaluations"][-1]["ratio"]
        assert ratio == (expected if isinstance(expected, str) else pytest.approx(expected))


def test_what_was_not_run_is_said() -> None:
    each = found(learned=result(1.0, "both"), whitening=result(0.1))
    assert each["verdict"] == "unknown"
    assert "was not measured; run learned/teleport-off and learned/step-only" in each["in_words"]
    assert each["brings"] == {"stays": "not run", "undone": "not run"}
    assert attribution_of(evaluation(whitening=result(1.0, "undone"))) == {}
    assert "no teleport is learned" in found(learned=result(1.0))["in_words"]


def test_it_stands_in_the_report_as_plain_json() -> None:
    off = result(3.0, seed=1)
    off.trajectory.loss[0, 5:] = np.nan
    report = report_of(evaluation(learned=result(1.0, "stays"), learned__teleport_off=off))
    back = json.loads(json.dumps(report, allow_nan=False))
    assert back == report
    assert "null" not in json.dumps(report)
    assert words_of(back) == [report["attribution"]["learned"]["in_words"]]
    assert report["methods"]["learned"]["gauge"] == "stays"
