"""The demo: first a shipped checkpoint beside AdamW, then two commands that a person can give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from metateleport import cli
from metateleport.cli import demo, evaluate, train
from metateleport.evaluation import beside


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contest is over after twenty steps of one seed."""
    whole = beside.beside

    def fewer(*given: Any, **named: Any) -> Any:
        return whole(*given, **{**named, "steps": 20, "seeds": 1, "rates": [0.01]})

    monkeypatch.setattr(beside, "beside", fewer)


@pytest.mark.usefixtures("short")
def test_the_first_part_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--first", "--out", "shown", "--json", "a.json"]) == 0
    shown = capsys.readouterr().out
    assert "LearnedOptimizer" in shown
    assert "AdamW, tuned" in shown
    assert "By second" in shown
    assert (tmp_path / "shown" / "beside.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "a.json").read_text())["checkpoint"] == demo.CHECKPOINT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "shown"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("code", [0, 2])
def test_the_rest_is_two_commands(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def fake(_: Any) -> int:
        seen.append(list(sys.argv))
        return code

    monkeypatch.setattr(train, "run", fake)
    monkeypatch.setattr(evaluate, "run", fake)
    before = list(sys.argv)
    assert cli.main(["demo", "--seconds", "7", "--no-track"]) == code
    assert sys.argv == before
    said = capsys.readouterr().err
    commands = [["metateleport", *line.split()[2:]] for line in said.splitlines() if line.startswith("$ ")]
    # What is shown is what is recorded as the command, and what runs.
    assert commands == seen
    assert [words[1] for words in seen] == (["train"] if code else ["train", "evaluate"])
    assert seen[0][seen[0].index("--seconds") + 1] == "7"
    # No second part without the first.
    assert ("The demo took" in said) == (code == 0)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo --out taken", "taken is a file"),
        ("demo --json .", "is a folder"),
        ("demo --first --checkpoint nowhere", "no checkpoint 'nowhere'"),
        ("demo --seconds 0", "at least 1"),
    ],
)
def test_bad_input_is_told_before_any_work(
    command: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert cli.main(command.split()) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_without_scikit_learn_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--first"]) == 2
    assert "metateleport[tasks]" in capsys.readouterr().err
