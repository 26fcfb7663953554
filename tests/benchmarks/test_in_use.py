"""The benchmark of the optimizers in use: the shape of its report, and what holds; never how good a checkpoint is."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.in_use import main

    chosen = ["--models", "mlp", "embedding, sparse", "--checkpoints", "digits", "--seeds", "2", "--steps", "12"]
    code = main([*chosen, "--json", str(tmp_path / "a.json")])
    report = json.loads((tmp_path / "a.json").read_text())
    cells = report["cells"]
    assert [cell["model"] for cell in cells] == ["mlp", "embedding, sparse"]
    assert [cell["within"] for cell in cells] == [1.1, 1.3]
    assert code == int(not all(cell["holds"] for cell in cells))
    for cell in cells:
        assert cell["failed"] is None
        assert cell["adamw"] < cell["start"]
        assert cell["ratio"] == pytest.approx(cell["final"] / cell["adamw"])
    shown = capsys.readouterr().out
    assert shown.count("| digits |") == 2
    assert "of 2 hold" in shown


def test_what_holds() -> None:
    from benchmarks.in_use import Cell

    good = Cell("mlp", "digits", 2.3, 1.0, 0.01, 1.09, False, False, False, (), None, 1.1)
    assert good.holds
    assert not dataclasses.replace(good, final=1.11).holds
    assert dataclasses.replace(good, final=1.11, said=("leaky_mlp is not made for convolutions: use digits",)).holds
    assert not dataclasses.replace(good, final=1.11, said=("no symmetries found: give example_input=",)).holds
    assert not dataclasses.replace(good, nan=True).holds
    assert not dataclasses.replace(good, above=True).holds
    assert not dataclasses.replace(good, final=None, failed="KeyError: 'weight'").holds
    assert not dataclasses.replace(good, final=math.nan).holds
    refused = dataclasses.replace(good, final=None, refused=True, said=("leaky_mlp has no network for it: use digits",))
    assert refused.holds
    assert refused.ratio is None


@pytest.mark.slow(seconds=2)
def test_every_model_has_data_that_it_takes() -> None:
    from benchmarks._in_use_models import MODELS
    from benchmarks.in_use import _loss_of

    for case in MODELS.values():
        torch.manual_seed(0)
        inputs, labels = case.data()
        assert len(inputs) == len(labels) >= 800, case.name
        loss = _loss_of(case.build(), (inputs[:4], labels[:4]))
        loss.backward()
        assert math.isfinite(float(loss)), case.name
