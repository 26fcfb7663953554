"""The benchmark of steps in use: the shape of its report and what it counts, never how long it took."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_counts_and_seconds_of_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import _step_models, steps

    monkeypatch.setitem(steps.MODELS, "mlp-0.1M", lambda: _step_models.perceptron(12, 2))
    names = ["adamw", "muon", "digits", "digits-without-symmetries", "teleporting-adamw"]
    asked = ["--models", "mlp-0.1M", "--rounds", "2", "--methods", *names, "--page", str(tmp_path / "a.md")]
    assert steps.main([*asked, "--json", str(tmp_path / "a.json")]) == 0
    page = (tmp_path / "a.md").read_text()
    assert "- mlp-0.1M: the learned step takes" in page
    assert page.count("(target 2, ") == page.count("(target 1.3, ") == 1
    measured = json.loads((tmp_path / "a.json").read_text())["models"]["mlp-0.1M"]
    assert measured["parameters"] == 64 * 12 + 12 + 12 * 12 + 12 + 12 * 10 + 10
    assert list(measured["cases"]) == names
    for case in measured["cases"].values():
        for figure in ("seconds", "over_adamw"):
            assert 0 < case[figure]["min"] <= case[figure]["median"] <= case[figure]["max"]
        assert case["operations"] > 0
    # Two moments of four bytes; what is a number or an LSTM's state for each tensor weighs on a model as small as this.
    assert measured["cases"]["adamw"]["bytes_per_parameter"] == pytest.approx(8, rel=0.05)
    assert measured["cases"]["digits"]["bytes_per_parameter"] == pytest.approx(8, rel=0.4)
    assert measured["cases"]["digits-without-symmetries"]["factorisations"] == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(names)


def test_the_memory_of_a_step_that_teleports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments and gradients, two more of the weights, and the work on one tensor at a time."""
    from benchmarks import _step_models, steps

    def few_samples() -> _step_models.Problem:
        problem = _step_models.perceptron(512, 4)
        return dataclasses.replace(problem, inputs=problem.inputs[:32], targets=problem.targets[:32])

    monkeypatch.setitem(steps.MODELS, "mlp-10M", few_samples)
    monkeypatch.setattr("metateleport.linalg.multiplies_halves", lambda _: True)
    # As of larger matrices each has its polar factor made by itself.
    monkeypatch.setattr("metateleport.linalg._CHUNK", 1)
    monkeypatch.setattr(steps, "_WARM_UP", 2)
    case = steps._Case("digits", "mlp-10M")
    case.warm_up()
    assert len(case.optimizer.last_step.moves) == 4
    # With only one of two moments, or of weights and gradients, carried in new memory it is 6.8 to 7.
    assert 6 < case.peak / sum(value.nbytes for value in case.problem.model.parameters()) < 6.75


def test_rounds_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.steps import main

    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err
