"""The commands that show checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metateleport import cli
from metateleport.checkpoint import load_checkpoint, shipped_checkpoints


def test_checkpoints_are_listed_with_the_models_that_they_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoints"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped_checkpoints())
    assert cli.main(["checkpoints", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["digits"]["data"] == "minibatches"
    assert rows["matrix_factorisation"]["models"].startswith("linear layers in a row")
    assert "gauges" in rows["leaky_mlp"]["learns"]


def test_a_damaged_one_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints" / "broken").mkdir(parents=True)
    (tmp_path / "checkpoints" / "broken" / "card.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["checkpoints"]) == 0
    assert "broken is left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(shipped_checkpoints()))
def test_a_card_is_shown_for_people(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# {name}")
    assert "## Training" in out
    assert ("| learned |" in out) == bool(load_checkpoint(name).card["results"])


def test_nothing_is_waiting_to_be_sent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path))
    assert cli.main(["sync"]) == 0
    assert "nothing is waiting" in capsys.readouterr().err
