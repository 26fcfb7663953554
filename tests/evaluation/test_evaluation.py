"""Evaluation: what is counted, what stands on the grid, fair baselines, tuning, report and plot."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metateleport import Task, TaskFamily, load_family
from metateleport.evaluation import (
    BASELINES,
    LBFGS,
    REFERENCES,
    Choice,
    FirstOrder,
    GaussNewton,
    GradientAscent,
    Lattice,
    Method,
    PerTask,
    Recorder,
    Rival,
    Trajectory,
    Whitening,
    evaluate,
    output_drift,
    paired_ratio,
    plot,
    ratio_over_seeds,
    report_of,
    table_of,
    tune,
    write_report,
)
from metateleport.evaluation.methods.gauss_newton import _System, jacobian_cost
from metateleport.evaluation.tuning import score, search
from metateleport.families import TaskStack

KEYS = {"gradient_evaluations", "mean", "median", "q25", "q75", "final", "diverged", "seconds"}


@pytest.fixture
def family() -> TaskFamily:
    return load_family("leaky_mlp", {"width": 5})


class Line(nn.Module):
    """Loss (w - target)^2 at w = 10 for all tasks: easy to know at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), 10.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def lines(count: int = 2) -> TaskStack:
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return TaskStack([Task(Line(), nn.functional.mse_loss, (one,), (zero,)) for _ in range(count)])


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


def single(task: Task, optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        inputs, targets = task.batch(step)
        optimizer.zero_grad()
        task.loss(model(*inputs), *targets).backward()
        optimizer.step()
        losses.append(task.loss(model(*task.inputs), *task.targets).item())
    return losses


class TestBaselines:
    @pytest.mark.parametrize("batch", [None, 2])
    @pytest.mark.parametrize("name", ["gd", "momentum", "adam"])
    def test_a_stack_takes_the_steps_that_each_task_takes_by_itself(self, name: str, batch: int | None) -> None:
        stack = load_family("leaky_mlp", {"width": 5, "batch": batch}).stack(range(3), "held-out")
        lr = 0.01 if name == "adam" else 1e-3
        method = BASELINES[name].make(lr=lr)
        assert isinstance(method, FirstOrder)
        loss = method.run(stack, 8).loss
        for index, task in enumerate(stack.tasks):
            model = copy.deepcopy(task.model)
            optimizer = method.optimizer(model.parameters(), **method.settings)
            np.testing.assert_allclose(loss[index, 1:], single(task, optimizer, model, 8), rtol=1e-10)

    def test_momentum_has_momentum(self) -> None:
        assert BASELINES["momentum"].make(lr=1.0).settings["momentum"] == 0.9

    @pytest.mark.parametrize("name", list(BASELINES))
    def test_a_method_leaves_the_stack_as_it_was_and_repeats_itself(self, name: str, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        before = {key: value.detach().clone() for key, value in stack.tensors().items()}
        method = BASELINES[name].make(lr=1e-3)
        first, second = method.run(stack, 14).loss, method.run(stack, 14).loss
        assert all(torch.equal(before[key], value) for key, value in stack.tensors().items())
        np.testing.assert_array_equal(first, second)
        assert (first[:, -1] < first[:, 0]).all()

    def test_gradient_ascent_pays_for_its_teleport(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        loss = GradientAscent(1e-3, ascent_steps=1).run(stack, 8).loss
        # Two layers: a gradient is rebuilt for a third, its derivative costs a whole one, once here; so 2 1/3 with
        # the evaluation itself.
        assert (loss[:, 1:3] == loss[:, :1]).all()
        assert (loss[:, 3] < loss[:, 0]).all()

    def test_gradient_ascent_drifts_little_and_raises_the_gradient(self, family: TaskFamily) -> None:
        trajectory = GradientAscent(1e-3, ascent_steps=3).run(family.stack(range(4), "held-out"), 8)
        assert trajectory.drift_max is not None
        assert 0 < trajectory.drift_max < 1e-9

    def test_gradient_ascent_survives_a_task_that_explodes(self, family: TaskFamily) -> None:
        trajectory = GradientAscent(1e3, "before every 10th step", 1).run(family.stack(range(2), "held-out"), 30)
        assert trajectory.diverged.all()
        # It stays where it was lost, and is not teleported from there.
        assert np.isfinite(trajectory.loss).all()
        assert trajectory.drift_max is not None
        assert trajectory.drift_max < 1e-6


class TestWhitening:
    @pytest.mark.parametrize(
        ("variant", "cost"),
        [
            ("gauge of the upper layers", 1),
            ("features, upper layers", 1),
            ("features", 4 / 3),
            # The lower layer's gauge also runs that layer once more.
            ("gauge per tensor", 3 / 2),
            ("alternating", (1 + 4 / 3) / 2),
            ("gauges in turn", (1 + 3 / 2) / 2),
        ],
    )
    def test_it_pays_for_what_it_rebuilds(self, family: TaskFamily, variant: str, cost: float) -> None:
        loss = Whitening(1e-3, variant).run(family.stack(range(2), "held-out"), 60).loss
        # Every step lowers the loss, so that the grid shows when each was paid for.
        assert len(np.unique(loss[0])) - 1 == pytest.approx(60 / cost, abs=1)

    @pytest.mark.parametrize("variant", ["alternating", "gauges in turn", "features, upper layers"])
    def test_it_solves_the_last_layer(self, family: TaskFamily, variant: str) -> None:
        trajectory = Whitening(1.0, variant, relative=False).run(family.stack(range(4), "held-out"), 20)
        assert (trajectory.loss[:, -1] < 1e-16 * trajectory.loss[:, 0]).all()
        plain = BASELINES["gd"].make(lr=1e-3).run(family.stack(range(4), "held-out"), 20)
        assert (plain.loss[:, -1] > 1e-4 * plain.loss[:, 0]).all()

    def test_gauges_never_move_along_the_orbit_and_teleports_do(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        assert Whitening(1.0, "gauge per tensor").moves_by == "undone"
        assert Whitening(1.0, "gauge per tensor").run(stack, 4).drift_max is None
        assert Whitening(1.0, "features").moves_by == "stays"
        assert (Whitening(1.0, "features").run(stack, 4).drift_max or 0) > 0

    def test_without_symmetries_it_is_gradient_descent(self) -> None:
        stack = lines(2)
        loss = Whitening(0.1, relative=False).run(stack, 5).loss
        np.testing.assert_allclose(loss, BASELINES["gd"].make(lr=0.1).run(stack, 5).loss, rtol=1e-12)

    def test_an_unknown_variant_is_refused(self) -> None:
        with pytest.raises(ValueError, match="one of alternating, gauge per tensor"):
            Whitening(1.0, "sideways")


class TestSecondOrder:
    def test_one_step_solves_a_linear_problem(self) -> None:
        family = load_family("leaky_mlp", {"width": 4, "activation": "identity", "samples": 9})
        stack = family.stack(range(2), "held-out")
        small = GaussNewton(damping=1e-12).run(stack, 200).loss
        for index, task in enumerate(stack.tasks):
            fit = torch.linalg.lstsq(task.inputs[0], task.targets[0]).solution
            floor = float((task.inputs[0] @ fit - task.targets[0]).square().sum() / 2)
            assert small[index, -1] == pytest.approx(floor, rel=1e-6)
        line = lines(2)
        # One Jacobian of one output, a trial, and the line is fitted.
        assert GaussNewton(damping=1e-12).run(line, 3).loss[:, 2] == pytest.approx([0, 0], abs=1e-15)
        assert GaussNewton(damping=1e4).run(line, 40).loss[:, -1] == pytest.approx([0, 0], abs=1e-9), "damping falls"

    def test_a_jacobian_costs_its_multiplications(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        tensors = {key: value.detach() for key, value in stack.tensors().items()}
        # Both forward passes take two products. A gradient takes three more, as the data need none; a Jacobian takes
        # three for each of five outputs.
        assert jacobian_cost(stack, tensors, stack.batch(0)) == pytest.approx((2 + 5 * 3) / (2 + 3), rel=0.05)

    def test_gauss_newton_pays_for_jacobians_and_trials(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        loss = GaussNewton(1.0, 1e-3).run(stack, 8).loss
        assert (loss[:, :4] <= loss[:, :1]).all()
        assert (loss[:, 1:4] == loss[:, :1]).all(), "the first step costs 3.4 and a third"
        assert (loss[:, -1] < loss[:, 0]).all()

    def test_a_step_is_that_of_the_damped_gauss_newton_matrix_with_any_loss(self) -> None:
        stack = load_family("digits", {"hidden": 3, "classes": 3, "samples": 6, "batch": None}).stack(
            [0], "train", dtype=torch.float64
        )
        tensors = {key: value.detach() for key, value in stack.tensors().items()}
        system = _System.at(stack, tensors, stack.full, torch.tensor([True]), None)
        factors = system.factors[0]
        gradients = stack.point_at(tensors, stack.full).gradients
        flat = torch.cat([gradients[name][0].flatten() for name in tensors])
        torch.testing.assert_close(factors.mT @ system.rights[0], flat, rtol=1e-9, atol=1e-12)
        matrix = factors.mT @ factors
        shift = 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        step = system.step(torch.tensor([0.1], dtype=torch.float64))
        taken = torch.cat([step[name][0].flatten() for name in tensors])
        torch.testing.assert_close(taken, -torch.linalg.solve(matrix + shift, flat), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("name", list(REFERENCES))
    @pytest.mark.parametrize("batch", [None, 2])
    def test_references_leave_the_stack_as_it_was_and_repeat_themselves(self, name: str, batch: int | None) -> None:
        if name == "soap":
            pytest.importorskip("pytorch_optimizer")
        stack = load_family("leaky_mlp", {"width": 5, "batch": batch}).stack(range(3), "held-out")
        before = {key: value.detach().clone() for key, value in stack.tensors().items()}
        method = REFERENCES[name].make(lr=0.1)
        loss = method.run(stack, 20).loss
        assert all(torch.equal(before[key], value) for key, value in stack.tensors().items())
        np.testing.assert_array_equal(loss, method.run(stack, 20).loss)
        assert (loss[:, -1] < loss[:, 0]).all()

    def test_an_optimizer_per_task_takes_the_steps_of_each(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        alike = PerTask("momentum", torch.optim.SGD, lr=1e-3, momentum=0.9).run(stack, 6).loss
        np.testing.assert_allclose(alike, BASELINES["momentum"].make(lr=1e-3).run(stack, 6).loss, rtol=1e-12)

    def test_a_task_that_is_lost_stops_no_other(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        for method in (PerTask("wild", torch.optim.SGD, lr=1e200), GaussNewton(1e200)):
            loss = method.run(stack, 12).loss
            assert loss.shape == (2, 13)


class TestLBFGS:
    @pytest.mark.parametrize("lr", [1.0, 0.3])
    def test_it_is_torchs_and_every_evaluation_is_counted(self, family: TaskFamily, lr: float) -> None:
        stack = family.stack(range(2), "held-out")
        budget = 25
        loss = LBFGS(lr).run(stack, budget).loss
        for index, task in enumerate(stack.tasks):
            for calls in (7, 16, budget):
                assert loss[index, calls] == pytest.approx(self.reference(task, lr, calls), rel=1e-9)

    @staticmethod
    def reference(task: Task, lr: float, calls: int) -> float:
        """The last point that one long call of torch's optimizer has accepted within so many closure calls."""
        best = task.loss(task.model(*task.inputs), *task.targets).item()
        for iterations in range(1, calls):
            model = copy.deepcopy(task.model)
            optimizer = torch.optim.LBFGS(
                model.parameters(), lr, iterations, 1000, 0.0, 0.0, line_search_fn="strong_wolfe"
            )
            made = 0

            def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                nonlocal made
                made += 1
                optimizer.zero_grad()
                loss = task.loss(model(*task.inputs), *task.targets)
                loss.backward()
                return loss

            optimizer.step(closure)
            if made > calls:
                return best
            best = task.loss(model(*task.inputs), *task.targets).item()
        return best

    def test_it_ends_at_a_minimum(self) -> None:
        stack = lines(1)
        assert LBFGS().run(stack, 50).loss[0, -1] == pytest.approx(0, abs=1e-20)

    def test_it_runs_on_minibatches(self) -> None:
        stack = load_family("leaky_mlp", {"width": 4, "samples": 8, "batch": 4}).stack(range(2), "held-out")
        assert np.isfinite(LBFGS().run(stack, 10).loss).all()


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


class TestPairedRatio:
    def test_it_is_paired(self) -> None:
        reference = np.logspace(-6, 6, 64)
        ratio = paired_ratio(2 * reference, reference)
        assert ratio.ratio == pytest.approx(2)
        assert ratio.low == pytest.approx(2)
        assert ratio.high == pytest.approx(2)

    def test_the_interval_covers_the_truth_about_as_often_as_it_says(self) -> None:
        source = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            pair = paired_ratio(3 * np.exp(source.normal(size=40)), np.ones(40), draws=300)
            hits += pair.low <= 3 <= pair.high
        assert 0.88 <= hits / 200 <= 0.99

    def test_over_seeds_the_interval_covers_the_truth_about_as_often_as_it_says(self) -> None:
        source = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            # Seeds and tasks both have effects of their own, and there are few seeds.
            logs = source.normal(size=(8, 1)) + source.normal(size=(1, 20)) + 0.3 * source.normal(size=(8, 20))
            pair = ratio_over_seeds(3 * np.exp(logs), np.ones((8, 20)), draws=200)
            hits += pair.low <= 3 <= pair.high
        assert 0.85 <= hits / 200 <= 0.99

    def test_over_seeds_it_is_paired_and_an_outlier_moves_it_little(self) -> None:
        reference = np.logspace(-6, 6, 20).reshape(4, 5)
        ratio = ratio_over_seeds(2 * reference, reference)
        assert tuple(ratio) == pytest.approx((2, 2, 2))
        lost = np.full((4, 5), 2.0)
        lost[0, 0] = np.inf
        assert ratio_over_seeds(lost * reference, reference).ratio == pytest.approx(2)

    def test_over_seeds_more_tasks_do_not_make_up_for_seeds(self) -> None:
        seeds = np.exp(np.random.default_rng(1).normal(size=(5, 1)))
        widths = []
        for tasks in (10, 1000):
            pair = ratio_over_seeds(np.repeat(seeds, tasks, axis=1), np.ones((5, tasks)), draws=200)
            widths.append(pair.high / pair.low)
        assert widths[1] > 0.9 * widths[0] > 1.5

    def test_values_that_are_not_paired_raise(self) -> None:
        with pytest.raises(ValueError, match="same tasks"):
            paired_ratio([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match="same tasks"):
            ratio_over_seeds([[1.0, 2.0]], [[1.0]])
        with pytest.raises(ValueError, match="one loss for each task"):
            paired_ratio([[1.0, 2.0]], [[1.0, 2.0]])
        with pytest.raises(ValueError, match="a row of losses for each"):
            ratio_over_seeds([1.0, 2.0], [1.0, 2.0])
