"""Every destination is tried before work starts, and what cannot be written later is told in a sentence."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from metateleport import cli

EVALUATE = "evaluate none leaky_mlp --set width=3 --tasks 2 --steps 3 --methods gd --no-track"


@pytest.mark.parametrize(
    "command",
    [
        f"{EVALUATE} --json FILE.json",
        f"{EVALUATE} --plot FILE.png",
        "experiment quadratic --no-track --json FILE.json",
        "experiment quadratic --no-track --png FILE.png",
        "experiment quadratic --no-track --page FILE.md",
        "reproduce figure-6 --json FILE.json",
        "train leaky_mlp --no-track --out FILE",
        "train leaky_mlp --no-track --meta-seeds 2 --out FILE",
        "demo --first --json FILE.json",
    ],
)
@pytest.mark.parametrize("folder", ["/proc/nowhere", "a_file"])
def test_a_place_without_rights_is_named_before_any_work(
    command: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").write_text("")

    def worked(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    for work in (
        "metateleport.evaluation.run_plan",
        "metateleport.papers.experiments.base.Experiment.run",
        "metateleport.papers.reproduction.figure_6",
        "metateleport.training.train",
        "metateleport.training.train_meta_seeds",
        "metateleport.evaluation.beside.beside",
    ):
        monkeypatch.setattr(work, worked)
    assert cli.main(command.replace("FILE", f"{folder}/out").split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("metateleport: ")
    assert "cannot be written" in said
    assert folder in said
    assert [each.name for each in tmp_path.iterdir()] == ["a_file"]


def test_an_evaluation_goes_on_where_its_runs_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METATELEPORT_CACHE", "/proc/nowhere")
    with pytest.warns(UserWarning, match="finished runs cannot be kept in /proc/nowhere/runs"):
        assert cli.main([*EVALUATE.split(), "--json", "out.json"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["methods"].keys() == {"gd"}


def test_a_disk_that_is_full_in_the_end_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out.json"))

    monkeypatch.setattr("metateleport.evaluation.write_report", full)
    assert cli.main([*EVALUATE.split(), "--json", "out.json"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out.json cannot be written (No space left on device): finished runs are kept" in said


def test_an_error_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/mnt/data.bin")

    monkeypatch.setattr("metateleport.cli.tasks.run", gone)
    assert cli.main(["tasks"]) == 2
    assert capsys.readouterr().err == "metateleport: /mnt/data.bin: No such file or directory\n"
