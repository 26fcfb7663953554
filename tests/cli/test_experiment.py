"""The command `metateleport experiment`: what it writes, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metateleport import cli
from metateleport.papers.experiments import EXPERIMENTS

SMALL = ["--set", "functions=3", "--set", "dimension=3"]


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every command runs in an empty folder and leaves MLflow's variables alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_it_writes_json_and_figure(away: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--json", "a/b.json", "--png", "b.png", "--page", "b.md", "--seed", "4", "--no-track"]
    assert cli.main(["experiment", "newton", *SMALL, *where]) == 0
    result = json.loads((away / "a" / "b.json").read_text())
    assert result["experiment"] == "newton"
    assert result["settings"] == {"functions": 3, "dimension": 3, "seed": 4}
    assert result["seconds"] > 0
    assert (away / "b.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "Proposition B.2" in out
    assert "wrote b.png" in err
    page = (away / "b.md").read_text(encoding="utf-8")
    assert "metateleport experiment newton --seed 4 " in page
    assert "--set functions=3 " in page
    claim = json.loads((away / "a/b.json").read_text())["claims"][0]
    assert f"| {claim['claim']} | {claim['source']} | {claim['value']:.3g}" in page
    assert sorted(path.name for path in away.iterdir()) == ["a", "b.md", "b.png"]


@pytest.mark.slow(seconds=3)
def test_it_is_tracked(away: Path) -> None:
    from mlflow import MlflowClient

    assert cli.main(["experiment", "newton", *SMALL]) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{away / 'mlflow.db'}")
    kept = client.get_experiment_by_name("experiment newton")
    (run,) = client.search_runs([kept.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["dimension"] == "3"
    assert run.data.params["seed"] == "0"
    assert run.data.metrics["claim_01_holds"] == 1.0
    assert json.loads(run.data.tags["claim_01"])["value"] == pytest.approx(run.data.metrics["claim_01"])
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"newton.json", "newton.png"}


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["experiment"]) == 0
    out = capsys.readouterr().out
    for name in EXPERIMENTS:
        assert name in out
    assert "functions=200" in out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("nothing", "there is no experiment 'nothing': there are quadratic"),
        ("newton --set size=3", "no setting 'size'"),
        ("newton --set functions=few", "takes int"),
        ("newton --set functions=1", "two functions"),
        ("newton --set functions", "name=value"),
        ("newton --seed -1", "--seed"),
        ("newton --png a.pdf", "ends in .png"),
        ("newton --json .", "is a folder"),
        ("--json a.json", "which experiment"),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(
    command: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, away: Path
) -> None:
    monkeypatch.setattr("metateleport.papers.experiments.base.Experiment.run", lambda *_: pytest.fail("it ran"))
    assert cli.main(["experiment", *command.split(), "--no-track"]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("metateleport: ")
    assert said in err
    assert err.count("\n") == 1
    assert not list(away.iterdir())


def test_a_run_that_cannot_be_tracked_says_so_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.setattr("metateleport.papers.experiments.base.Experiment.run", lambda *_: pytest.fail("it ran"))
    assert cli.main(["experiment", "newton"]) == 2
    assert "--no-track" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["experiment", "--help"])
    assert stopped.value.code == 0
    assert "not decided" in capsys.readouterr().out
