"""The benchmark of the learned updates: the shape of its report and the state it counts, never how long it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_state_and_seconds_of_every_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.updates import main

    sizes = ["--widths", "30", "40", "20", "--rounds", "2"]
    assert main([*sizes, "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    parameters = 30 * 40 + 40 + 40 * 20 + 20
    assert report["settings"]["parameters"] == parameters
    cases = {case["name"]: case for case in report["cases"]}
    assert list(cases) == ["adam", "coordinate", "tensor", "adaptive"]
    tensors, hidden = 4, 32
    # Two moments; Adam also counts its steps, one for each tensor.
    assert cases["adam"]["state_per_parameter"] == pytest.approx(2 + tensors / parameters)
    # A velocity, a second moment, the two numbers of an LSTM unit for every unit of a tensor's LSTM, and the longest
    # step of a tensor.
    own = (2 * hidden + 1) * tensors / parameters
    assert cases["tensor"]["state_per_parameter"] == pytest.approx(2 + own)
    # Beside the same a momentum, and two layers of twenty units at every coordinate.
    assert cases["coordinate"]["state_per_parameter"] == pytest.approx(83 + own)
    for case in cases.values():
        for figure in ("seconds", "over_adam"):
            assert 0 < case[figure]["min"] <= case[figure]["median"] <= case[figure]["max"]
    assert capsys.readouterr().out.count("\n") == 2 + len(cases)


@pytest.mark.parametrize("arguments", [["--widths", "3"], ["--widths", "3", "0"], ["--rounds", "0"]])
def test_sizes_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.updates import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert "positive" in capsys.readouterr().err
