"""Benchmarks: the shape of what they report and the work that they time; never how long it took."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metateleport.families import load_family

ROOT = Path(__file__).parents[2]
SMALL = ["--width", "4", "--unroll", "2", "--rounds", "2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks lie beside the package and are run from the project's folder."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import _timing

    monkeypatch.setattr(_timing, "_MOST_REPEATS", 1)


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers_in(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers_in(each)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.usefixtures("short_rounds")
def test_report_has_every_case_with_its_rounds_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.meta_training import main

    files = ["--json", str(tmp_path / "out.json"), "--page", str(tmp_path / "page.md")]
    main([*SMALL, "--modes", "lr", "lr+tele", "--tasks", "1", "3", *files])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["schema"] == 2
    assert report["unit"] == "microseconds per task-step"
    assert report["settings"]["tasks"] == [1, 3]
    assert report["settings"]["rounds"] == 2
    assert {"cpu", "cores", "threads", "torch", "device", "cpu_share"} <= report["conditions"].keys()
    cases = {case["name"]: case for case in report["cases"]}
    stacked = {
        f"{each}/{count}" for each in ("equivariant/lr", "equivariant/lr+tele", "flat/lr+tele") for count in (1, 3)
    }
    source = {"source/lr+tele", "source/lr+tele/hidden=300"}
    assert cases.keys() == stacked | source | {"roof/lr+tele/3", "floor/sgd/3"}
    for case in cases.values():
        for part in ("meta_gradient", "meta_step", "cpu"):
            times = case[part]
            assert len(times["rounds"]) == 2
            assert times["min"] == min(times["rounds"])
            assert times["max"] == max(times["rounds"])
            assert 0 < times["min"] <= times["median"] <= times["max"]
        assert all(
            whole > part
            for whole, part in zip(case["meta_step"]["rounds"], case["meta_gradient"]["rounds"], strict=True)
        )
    ratios = report["ratios"]
    assert ratios["stacked_over_single"].keys() == {name for name in stacked if name.endswith("/3")}
    assert ratios["ours_over_source"].keys() == {name for name in stacked if "tele" in name} | {"roof/lr+tele/3"}
    ours, source = (cases[name][ratios["basis"]]["rounds"] for name in ("flat/lr+tele/3", "source/lr+tele"))
    expected = sorted(a / b for a, b in zip(ours, source, strict=True))
    found = ratios["ours_over_source"]["flat/lr+tele/3"]
    assert [found["min"], found["max"]] == pytest.approx(expected)
    assert all(math.isfinite(number) for number in numbers_in(report))
    printed = capsys.readouterr().out
    assert all(name in printed for name in cases)
    # Counts depend on the work alone: one inner step of three tasks takes the operations of one, and three times as
    # many matrices.
    counts = {name: case["counts"] for name, case in cases.items()}
    one, three = (counts[f"equivariant/lr+tele/{tasks}"] for tasks in (1, 3))
    assert three["operations"] == pytest.approx(one["operations"], rel=0.1)
    assert three["factorised_per_task_step"] == one["factorised_per_task_step"] >= 5
    assert counts["equivariant/lr/3"]["factorised_per_task_step"] == 0
    assert three["kept_bytes"] > one["kept_bytes"] > 0
    page = (tmp_path / "page.md").read_text()
    assert f"| {counts['roof/lr+tele/3']['operations']:.0f} |" in page
    faster = 1 / ratios["ours_over_source"]["equivariant/lr+tele/3"]["median"]
    said = "met" if faster >= 4 else "not met"
    assert f"{faster:.1f} times the source's speed; the target, 4, is {said}." in page
    assert "nan" not in page


def test_memory_is_told_of_the_whole_stack_in_parts() -> None:
    from benchmarks._meta_memory import _peak

    peak = _peak("tensor", 5, 3, 2, 2)
    assert (peak["name"], peak["at_once"]) == ("tensor/update+tele/5", 2)
    assert 50 < peak["before"] <= peak["megabytes"]


@pytest.mark.slow(seconds=5)
def test_command_runs_from_the_projects_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.meta_training",
        *SMALL,
        "--modes",
        "lr",
        "--tasks",
        "1",
        "--json",
        str(out),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["cases"][0]["name"] == "equivariant/lr/1"
    assert [each.name for each in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "0"], "above zero"),
        (["--modes", "step"], "lr+tele"),
        (["--json", "."], "is a folder"),
        (["--device", "tpu"], "cuda"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.meta_training import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_every_mode_gives_a_meta_gradient() -> None:
    from benchmarks.meta_training import cases_of
    from metateleport.learned import MODES

    cases = cases_of(MODES, [2], width=3, unroll=2, device=CPU)
    assert len({case.name for case in cases}) == len(cases) == 19
    for case in cases:
        case.rewind()
        case.meta_gradient()
        # Of every network: one that takes no part in the unroll would be timed for nothing.
        silent = [name for name, value in case.networks.named_parameters() if value.grad is None]
        assert not silent, f"{case.name}: {silent}"
        norm = case.meta_step()
        assert math.isfinite(norm)
        assert norm > 0


def test_rewinding_repeats_the_same_work() -> None:
    from benchmarks.meta_training import cases_of

    case = cases_of(["lr"], [2], width=3, unroll=2, device=CPU)[0]
    norms = []
    for _ in range(2):
        case.rewind()
        case.meta_gradient()
        norms.append(case.meta_step())
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_source_loop_stands_on_the_same_task_and_its_teleport_keeps_the_loss() -> None:
    from benchmarks._source_loop import SourceTask, evaluate, teleport

    # Normal, for pre-activations of both signs.
    family = load_family("leaky_mlp", {"width": 6, "distribution": "normal"})
    stack = family.stack([3])
    task = SourceTask.of(family.task(3), CPU)
    loss, gradients = evaluate(task.weights, task)
    assert loss.dtype == torch.float64
    point = stack.point_at(stack.tensors(), stack.full)
    assert loss.item() == pytest.approx(point.loss.item(), rel=1e-12)
    for found, expected in zip(gradients, point.gradients.values(), strict=True):
        torch.testing.assert_close(found, expected[0])
    moved = teleport(task.weights, torch.randn(6, 6, dtype=torch.float64), task)
    assert all((new - old).norm() > 1e-3 for new, old in zip(moved, task.weights, strict=True))
    # First-order elements miss by about the square of their size, a ten-thousandth.
    assert evaluate(moved, task)[0].item() == pytest.approx(loss.item(), rel=2e-3)


class FakeCase:
    """Takes known times on a clock of its own and writes down when it was called."""

    def __init__(self, name: str, seconds: float, now: list[float], calls: list[str], norm: float = 1.0) -> None:
        self.name, self.task_steps = name, 10
        self.seconds, self.now, self.calls, self.norm = seconds, now, calls, norm

    def rewind(self) -> None:
        self.now[0] += 100.0

    def meta_gradient(self) -> None:
        self.calls.append(self.name)
        self.now[0] += self.seconds

    def meta_step(self) -> float:
        self.now[0] += self.seconds / 2
        return self.norm


def test_rounds_are_interleaved_after_a_warm_up_and_rewinding_is_not_timed() -> None:
    from benchmarks._timing import measure

    now, calls = [0.0], []
    cases = [FakeCase(name, seconds, now, calls) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 0.05))]
    found = measure(cases, 6, 1.0, CPU, clock=lambda: now[0])
    assert calls[:3] == ["a", "b", "c"]
    # A fast case is repeated in each round, to fill a fifth of a second, and its mean taken.
    rounds = [calls[start : start + 5] for start in range(3, len(calls), 5)]
    assert len(rounds) == 6
    assert all(sorted(each) == ["a", "b", "c", "c", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 0.05)):
        assert found[name].meta_gradient == pytest.approx([1e6 * seconds / 10] * 6)
        assert found[name].meta_step == pytest.approx([1.5e6 * seconds / 10] * 6)


def test_rounds_fill_the_time_but_are_never_fewer_than_three() -> None:
    from benchmarks._timing import measure

    for seconds, rounds in ((1.0, 3), (102 * 8 - 1.0, 6), (102 * 8 + 1.0, 7)):
        now, calls = [0.0], []
        case = FakeCase("a", 4 / 3, now, calls)
        assert len(measure([case], None, seconds, CPU, clock=lambda now=now: now[0])["a"].meta_step) == rounds


def test_a_meta_gradient_that_is_not_finite_is_an_error() -> None:
    from benchmarks._timing import measure

    now = [0.0]
    with pytest.raises(FloatingPointError, match="broken"):
        measure([FakeCase("broken", 1.0, now, [], math.nan)], 1, 1.0, CPU, clock=lambda: now[0])


def test_teleporters_page_has_every_teleporter_and_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import teleporters

    monkeypatch.setattr(teleporters, "STEPS", 2)
    size = ["--tasks", "2", "--rounds", "1", "--budget", "9"]
    cases = ["--families", "leaky_mlp", "--priced", "leaky_mlp with tanh, 16 tasks", "digits, one task"]
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "page.md")]
    assert teleporters.main([*size, *cases, *files]) == 0
    report, page = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "page.md").read_text()
    assert [row["task"] for row in report["prices"]] == ["leaky_mlp with tanh, 16 tasks", "digits, one task"]
    assert [row["symmetries"][0][:21] for row in report["prices"]] == ["batch pair, 2024 form", "rescaling, PositiveDi"]
    assert all(row["ratios"][kind]["median"] > 0 for row in report["prices"] for kind in ("ascent", "teleport"))
    rows = {row["teleporter"]: row for row in report["gains"]["leaky_mlp"]}
    assert rows.keys() == teleporters.TELEPORTERS.keys()
    assert all(name in page for name in rows)
    assert f"{max(row['ratios']['ascent']['median'] for row in report['prices']):.2f} for the ascent" in page
    assert rows["none"]["loss_ratio"] == 1
    assert rows["none"]["evaluations"] == 0
    assert rows["gradient norm, ascent"]["gradient_norm"] > 1
