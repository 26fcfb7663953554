"""`metateleport which`: the checkpoint for a model, or AdamW."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from metateleport import cli
from metateleport.cli import which

NETS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)

def frozen():
    return nn.Linear(4, 3).requires_grad_(False), torch.randn(8, 4)

def unfit():
    return nn.Linear(2, 2), torch.randn(3, 5)

def lazy():
    return nn.LazyLinear(2), torch.randn(3, 5)

class Talks(nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x)

def talks():
    print("made")
    return Talks(4, 3), torch.randn(8, 4)

def leaves():
    raise SystemExit("no data here")
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path


def asked(nets: Path, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert cli.main(["which", f"{nets}:{name}", "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_where_the_price_is_high_adamw_is_the_answer(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which, "_DEAR", 0.0)
    found = asked(nets, "small", capsys)
    assert (found["use"], found["checkpoint"], found["parameters"]) == ("adamw", "default", 23)
    price = found["price"]
    assert isinstance(price, dict)
    assert price["ratio"] == pytest.approx(price["learned"] / price["adamw"])
    assert "where steps or data are what is short" in str(found["because"])


def test_where_the_price_is_low_the_checkpoint_is_the_answer(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which, "_DEAR", 1e9)
    assert asked(nets, "small", capsys)["use"] == "default"
    assert cli.main(["which", f"{nets}:small"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("use 'default': ")
    assert "price " in printed
    assert "LearnedOptimizer(model, 'default', total_steps=...)" in printed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("frozen", "no parameter of this model is trained"),
        ("unfit", "does not train on its example input"),
        ("lazy", "lazy"),
    ],
)
def test_what_no_checkpoint_serves_is_adamw_s(
    name: str, said: str, nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = asked(nets, name, capsys)
    assert (found["use"], found["checkpoint"]) == ("adamw", None)
    assert said in str(found["because"])
    assert cli.main(["which", f"{nets}:{name}"]) == 0
    assert capsys.readouterr().out.startswith("use AdamW: ")


def test_a_factory_that_is_not_there_is_named(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["which", f"{nets}:none"]) == 2
    assert "has no function 'none'" in capsys.readouterr().err


def test_steps_that_are_left_out_have_no_price() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    found = which.advice(model, torch.full((2, 8), 1e30))
    assert found["price"] is None
    assert "steps are left out" in found["because"]


def test_what_a_model_prints_is_no_part_of_the_answer(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["which", f"{nets}:talks", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["parameters"] == 15
    assert "made" in err
    assert "forward" in err


def test_a_factory_that_ends_the_program_is_named(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["which", f"{nets}:leaves"]) == 2
    assert "leaves failed: SystemExit: no data here" in capsys.readouterr().err
