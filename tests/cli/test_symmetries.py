"""`metateleport symmetries`: the table from the shell."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from metateleport.cli.common import UsageError
from metateleport.cli.symmetries import add

NETS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)

def keywords():
    return nn.Linear(4, 3), {"input": torch.randn(8, 4)}

def fails():
    raise RuntimeError("no such luck")

def model_only():
    return nn.Linear(2, 2)

def frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return model.requires_grad_(False), torch.randn(8, 4)

def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.randn(8, 4)

def unfit():
    return nn.Linear(2, 2), torch.randn(3, 5)

number = 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    parsed = parser.parse_args(["symmetries", *arguments])
    return int(parsed.run(parsed))


def test_the_table_is_printed(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{nets}:small") == 0
    printed = capsys.readouterr().out
    assert "0.weight, 0.bias, 2.weight" in printed
    assert "1 symmetries of 3 dimensions in all" in printed
    assert run(f"{nets}:keywords") == 0


def test_json_is_written_with_the_same_keys(nets: Path, tmp_path: Path) -> None:
    assert run(f"{nets}:small", "--json", str(tmp_path / "deep" / "found.json")) == 0
    data = json.loads((tmp_path / "deep" / "found.json").read_text(encoding="utf-8"))
    assert set(data) == {"schema", "symmetries", "refused"}
    keys = {"kind", "group", "dimension", "exactness", "parameters", "drift"}
    assert keys <= set(data["symmetries"][0])


def test_frozen_parameters_are_named_and_move_with_the_switch(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{nets}:frozen") == 0
    assert "frozen=True [0.weight, 0.bias, 2.weight, 2.bias]" in capsys.readouterr().out
    assert run(f"{nets}:frozen", "--frozen") == 0
    assert "1 symmetries of 3 dimensions in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{nets}", "not of the form FILE.py:FACTORY"),
        ("{nets}:", "not of the form"),
        ("nowhere.py:small", "there is no file nowhere.py"),
        ("{nets}:other", "has no function 'other'; it has .*small"),
        ("{nets}:number", "has no function 'number'"),
        ("{nets}:fails", "RuntimeError: no such luck"),
        ("{nets}:model_only", "has to return a pair"),
        ("{nets}:lazy", "one forward pass first"),
        ("{nets}:unfit", "does not run on its example input"),
    ],
)
def test_bad_input_names_the_cause(nets: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(name.format(nets=nets))


def test_a_file_that_does_not_run_and_a_folder_to_write(nets: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        run(f"{broken}:small")
    with pytest.raises(UsageError, match="is a folder"):
        run(f"{nets}:small", "--json", str(tmp_path))
