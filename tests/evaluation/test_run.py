"""An evaluation: its report, table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from metateleport import TaskFamily, load_family
from metateleport.evaluation import (
    BASELINES,
    FirstOrder,
    GradientAscent,
    evaluate,
    plot,
    report_of,
    table_of,
    write_report,
)

KEYS = {"gradient_evaluations", "mean", "median", "q25", "q75", "final", "diverged", "seconds"}


class TestReport:
    @pytest.fixture
    def report(self, family: TaskFamily) -> dict[str, object]:
        methods = [BASELINES["gd"].make(lr=1e-3), FirstOrder("wild", lr=1e6), GradientAscent(1e-3, ascent_steps=1)]
        return report_of(evaluate(family, methods, tasks=3, steps=40, seed=2))

    def test_its_keys_and_lengths(self, report: dict) -> None:
        assert {"schema", "task", "checkpoint", "seed", "methods", "conditions"} <= report.keys()
        for entry in report["methods"].values():
            assert entry.keys() >= KEYS
            assert entry["gradient_evaluations"] == list(range(41))
            assert all(len(entry[key]) == 41 for key in ("mean", "median", "q25", "q75", "seconds_along"))
            assert len(entry["final"]) == len(entry["diverged"]) == 3
        assert "drift_max" in report["methods"]["gradient-ascent"]
        assert "drift_max" not in report["methods"]["gd"]

    def test_it_is_strict_json_without_null_and_says_what_diverged(self, report: dict, tmp_path: Path) -> None:
        write_report(tmp_path / "a.json", report)
        text = (tmp_path / "a.json").read_text()
        assert "null" not in text
        back = json.loads(text, parse_constant=pytest.fail)
        assert back == report
        assert back["methods"]["wild"]["diverged"] == [True] * 3
        assert back["methods"]["wild"]["final"] == [1e300] * 3
        assert back["methods"]["gd"]["diverged"] == [False] * 3

    def test_all_methods_start_from_the_same_points(self, report: dict) -> None:
        assert len({entry["median"][0] for entry in report["methods"].values()}) == 1

    def test_a_measure_of_the_tasks_own_takes_the_place_of_the_loss(self, report: dict, tmp_path: Path) -> None:
        assert report["measure"] == "training loss"
        family = load_family("matrix_factorisation", {"width": 5, "rank": 2, "batch": 20, "noise": 0.1})
        judged = report_of(evaluate(family, [BASELINES["adam"].make(lr=0.05)], tasks=2, steps=40))
        assert judged["measure"] == "squared relative error"
        entry = judged["methods"]["adam"]
        stack = family.stack(range(2), "held-out")
        start = stack.measured({key: value.detach() for key, value in stack.tensors().items()})
        assert entry["median"][0] == pytest.approx(float(start.mean()))
        assert entry["median"][-1] < entry["median"][0]
        assert "squared relative error" in str(table_of(judged).title)
        plot(judged, tmp_path / "a.svg")
        assert "squared relative error" in (tmp_path / "a.svg").read_text()

    def test_held_out_values_stand_beside(self) -> None:
        family = load_family("digits", {"samples": 64, "batch": 32})
        report = report_of(evaluate(family, [BASELINES["adam"].make(lr=1e-2)], tasks=2, steps=3))
        entry = report["methods"]["adam"]
        assert all(0 <= value <= 1 for value in entry["held_out_accuracy"]["median"])
        assert len(entry["held_out_loss"]["median"]) == 4

    def test_table_and_plot(self, report: dict, tmp_path: Path) -> None:
        assert table_of(report).row_count == 3
        plot(report, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(list(tmp_path.iterdir())) == 1

    def test_the_same_seed_gives_the_same_values(self, family: TaskFamily) -> None:
        def losses(seed: int) -> np.ndarray:
            method = BASELINES["gd"].make(lr=1e-3)
            return evaluate(family, [method], tasks=2, steps=3, seed=seed).results["gd"].trajectory.loss

        np.testing.assert_array_equal(losses(1), losses(1))
        assert (losses(1) != losses(2)).all()
