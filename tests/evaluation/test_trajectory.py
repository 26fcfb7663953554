"""What is kept of a run: losses by gradient evaluations, where each task stands, what is timed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluation_cases import lines
from torch import Tensor

from metateleport import TaskFamily
from metateleport.evaluation import (
    BASELINES,
    Recorder,
    output_drift,
)
from metateleport.evaluation.trajectory import every_so_often


def at(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64).unsqueeze(1)}


class TestRecorder:
    def test_a_point_stands_from_the_first_whole_cost_that_pays_for_it(self) -> None:
        recorder = Recorder(lines(), budget=4)
        recorder.charge(torch.tensor([1.0, 4 / 3], dtype=torch.float64))
        recorder.record(at(3.0, 3.0))
        recorder.charge(torch.tensor([1 / 3, 5 / 3], dtype=torch.float64))
        recorder.record(at(2.0, 2.0))
        loss = recorder.trajectory().loss
        assert loss.tolist() == [[100, 9, 4, 4, 4], [100, 100, 9, 4, 4]]

    @pytest.mark.parametrize("budget", [3, 10, 40, 100])
    def test_thirds_that_add_up_to_a_whole_number_cost_that_number(self, budget: int) -> None:
        recorder = Recorder(lines(1), budget)
        for _ in range(3 * budget):
            assert recorder.affords(1 / 3).all()
            recorder.charge(1 / 3)
        recorder.record(at(1.0))
        assert recorder.trajectory().loss[0].tolist() == [100] * budget + [1]
        assert not recorder.affords(1 / 3).any()

    def test_what_was_not_accepted_leaves_the_task_at_its_last_accepted_point(self) -> None:
        recorder = Recorder(lines(), budget=3)
        for values, accepted in (((3.0, 3.0), (True, True)), ((5.0, 1.0), (False, True))):
            recorder.charge(1.0)
            recorder.record(at(*values), torch.tensor(accepted))
        assert recorder.trajectory().loss.tolist() == [[100, 9, 9, 9], [100, 9, 1, 1]]

    def test_a_point_beyond_the_budget_does_not_count(self) -> None:
        recorder = Recorder(lines(1), budget=2)
        recorder.charge(7 / 3)
        recorder.record(at(0.0))
        assert recorder.trajectory().loss[0].tolist() == [100, 100, 100]

    def test_reporting_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(1000))
        monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
        recorder = Recorder(lines(1), budget=2)
        before = next(clock)
        recorder.charge(1.0)
        recorder.record(at(1.0))
        with recorder.untimed():
            for _ in range(100):
                next(clock)
        # Every look at the clock is one second: of what passed only those outside of reports are left.
        assert recorder.trajectory().seconds < before + 10

    @pytest.mark.parametrize(
        ("values", "diverged"),
        [((9.0, 9.0), False), ((math.nan, 9.0), True), ((9.0, 11.0), True), ((12.0, 9.0), False)],
    )
    def test_diverged(self, values: tuple[float, float], diverged: bool) -> None:
        recorder = Recorder(lines(1), budget=2)
        for value in values:
            recorder.charge(1.0)
            recorder.record(at(value))
        assert recorder.trajectory().diverged.tolist() == [diverged]

    def test_drift_is_the_relative_change_of_outputs(self) -> None:
        stack = lines()
        assert output_drift(stack, at(2.0, 2.0), at(2.0, 2.5), stack.full).tolist() == pytest.approx([0.0, 0.25])
        assert math.isinf(output_drift(stack, at(2.0, 2.0), at(2.0, math.inf), stack.full)[1])


def test_measuring_now_and_then_gives_the_same_losses_where_it_measures(family: TaskFamily) -> None:
    stack, method = family.stack(range(2), "held-out"), BASELINES["gd"].make(lr=1e-3)
    whole = method.run(stack, 40).loss
    with every_so_often(8):
        thinned = method.run(stack, 40).loss
    for place in (0, 8, 12, 16, 24, 30, 32, 40):
        np.testing.assert_array_equal(thinned[:, place], whole[:, place])
    np.testing.assert_array_equal(thinned[:, 13:16], np.repeat(whole[:, 12:13], 3, axis=1))
