"""The command line: what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from learned_cases import shape_of

import metateleport as mt
from metateleport import cli
from metateleport.checkpoint import save_checkpoint
from metateleport.cli import ui
from metateleport.learned import MetaOptimizer


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every command runs in an empty folder with a memory of its own, and leaves MLflow's variables alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.slow(seconds=4)
def test_evaluate_from_end_to_end(away: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--json", "a.json", "--plot", "a.png", "--no-track"]
    command = ["evaluate", "none", "leaky_mlp", "--set", "width=4", "--tasks", "4", "--steps", "12", *where]
    assert cli.main(command) == 0
    report = json.loads((away / "a.json").read_text())
    assert list(report["methods"]) == ["gd", "momentum", "adam", "lbfgs", "gradient-ascent", "whitening"]
    assert report["checkpoint"] == "none"
    assert report["task"]["settings"]["width"] == 4
    for entry in report["methods"].values():
        assert len(entry["median"]) == 13
        assert entry["median"][-1] < entry["median"][0]
        assert not any(entry["diverged"])
        assert entry["tuning"]["split"] == "train"
    assert (away / "a.png").stat().st_size > 10_000
    assert "gradient-ascent" in capsys.readouterr().out
    assert not (away / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate none nowhere", "no task family 'nowhere'"),
        ("evaluate none missing.py", "no file missing.py"),
        ("evaluate nowhere leaky_mlp", "no checkpoint 'nowhere'"),
        ("evaluate none leaky_mlp --set width", "name=value"),
        ("evaluate none leaky_mlp --set size=3", "no setting 'size'"),
        ("evaluate none leaky_mlp --set width=-3", "width"),
        ("evaluate none leaky_mlp --set width=3 --set width=4", "twice"),
        ("evaluate none leaky_mlp --device tpu", "auto, cpu or cuda"),
        ("evaluate none leaky_mlp --methods gd,learned", "no method 'learned' without a checkpoint"),
        ("evaluate none leaky_mlp --methods newton", "did you mean 'gauss-newton'?"),
        ("evaluate none leaky_mlp --methods lora+", "symmetry of the kind 'LoRA pair'"),
        ("evaluate none leaky_mlp --trials 3", "--trials: that is a rule of --rivals fair"),
        ("evaluate none leaky_mlp --measure end", "--measure: that is a rule of --rivals fair"),
        ("evaluate none leaky_mlp --rivals fair --measure target", "give --target METHOD@K, as adamw@100"),
        ("evaluate none leaky_mlp --rivals fair --target adamw@9", "give --measure target"),
        ("evaluate none leaky_mlp --rivals fair --measure target --target adamw@900", "past the budget of 100"),
        ("evaluate none leaky_mlp --rivals fair --measure target --target adams@9", "'adams' is none"),
        ("evaluate none leaky_mlp --methods gd --against adam", "--against adam: that is none of the methods: gd"),
        ("evaluate none leaky_mlp --methods ,", "names none"),
        ("evaluate none leaky_mlp --tasks 0", "at least 1"),
        ("evaluate none leaky_mlp --seed -1", "--seed"),
        ("evaluate none leaky_mlp --plot a.bmp", "png, svg or pdf"),
        ("evaluate none leaky_mlp --json .", "is a folder"),
        ("train nowhere", "no task family 'nowhere'"),
        (
            "train leaky_mlp --set rule.kind=telepathy",
            "known are lr, coordinate, tensor, adaptive, static, gauged",
        ),
        ("train leaky_mlp --set outer.horizon=5", "outer.unroll = 10"),
        ("train leaky_mlp --set width=12", "those of the task family are family.NAME"),
        ("train leaky_mlp --set family.size=3", "no setting 'size'"),
        ("train leaky_mlp --seed 1 --set outer.seed=2", "the same setting"),
        ("train leaky_mlp --seconds -1", "outer.seconds has to be a positive number"),
        ("train", "a task family or --recipe"),
        ("train leaky_mlp --recipe digits", "a task family or --recipe"),
        ("train --recipe nowhere", "no recipe 'nowhere': known by name are bottleneck_digits"),
        ("ui", "no runs"),
        ("teach", "invalid choice"),
    ],
)
def test_bad_input_is_told_in_one_line_before_any_work(
    command: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, away: Path
) -> None:
    monkeypatch.setattr("metateleport.tracking.Run", lambda *_: pytest.fail("a run was opened"))
    extra = ["--no-track"] if command.startswith(("evaluate", "train")) else []
    assert cli.main([*command.split(), *extra]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("metateleport: ")
    assert said in err
    assert err.count("\n") == 1
    assert not out
    assert not list(away.iterdir())


def test_tracking_without_mlflow_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert cli.main(["evaluate", "none", "leaky_mlp"]) == 2
    assert "--no-track" in capsys.readouterr().err


def test_a_missing_device_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["evaluate", "none", "leaky_mlp", "--device", "cuda", "--no-track"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metateleport.evaluation.plan.load_family", stop)
    assert cli.main(["evaluate", "none", "leaky_mlp", "--no-track"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_interrupted_training_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from metateleport.training import Interrupted

    def stop(*_: object, **__: object) -> None:
        raise Interrupted("the same command with --resume goes on")

    monkeypatch.setattr("metateleport.training.train", stop)
    assert cli.main(["train", "leaky_mlp", "--no-track"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_train_passes_on_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def fake(recipe, out, resume, *_):  # type: ignore[no-untyped-def]
        seen.update(recipe=recipe, out=out, resume=resume)
        return out

    monkeypatch.setattr("metateleport.training.train", fake)
    monkeypatch.setattr("metateleport.training.check_start", lambda *_, **__: None)
    command = (
        "train leaky_mlp --set family.width=6 --set teleport=none --set outer.meta_steps=20 --seconds 2.5 --seed 3 "
        "--out x --resume --no-track"
    )
    assert cli.main(command.split()) == 0
    recipe = seen["recipe"]
    assert (recipe.mode, recipe.outer.meta_steps, recipe.outer.seconds, recipe.outer.seed) == ("lr", 20, 2.5, 3)
    assert recipe.family.settings["width"] == 6
    assert seen["out"] == Path("x")
    assert seen["resume"]
    assert "metateleport evaluate x leaky_mlp" in capsys.readouterr().err


def test_tasks_lists_the_gallery_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["leaky_mlp"]["settings"]["width"] == 20
    assert rows["leaky_mlp"]["summary"].startswith("Regression")


def test_ui_serves_the_store_that_runs_are_written_to(monkeypatch: pytest.MonkeyPatch, away: Path) -> None:
    (away / "mlflow.db").touch()
    seen: list[list[str]] = []

    def become(command: list[str]) -> int:
        seen.append(command)
        return 0

    monkeypatch.setattr(ui, "_become", become)
    assert cli.main(["ui", "--port", "5050"]) == 0
    assert f"sqlite:///{away / 'mlflow.db'}" in seen[0]
    assert seen[0][-1] == "5050"


@pytest.mark.parametrize(
    "command",
    ["", "train", "combine", "evaluate", "reproduce", "tasks", "ui", "compare", "promote", "serve", "show", "sync"],
)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "usage: metateleport" in capsys.readouterr().out


def test_it_starts_without_mlflow_and_matplotlib() -> None:
    code = (
        "import sys, metateleport.cli as c\n"
        "c.main(['tasks', '--json'])\n"
        "print([m for m in ('mlflow', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.slow(seconds=4)
def test_flat_networks_tell_a_shape_they_were_not_made_for(tmp_path: Path) -> None:
    """In a process of its own, where nobody has imported the papers' networks before."""
    shape = (("0.weight", (6, 6)), ("2.weight", (6, 6)))
    meta = MetaOptimizer(shape_of(hidden=4, groups=("GL",), shapes=shape))
    save_checkpoint(tmp_path / "flat", meta, None, {})
    settings = ["--set", "width=8", "--tasks", "2", "--steps", "3", "--methods", "learned", "--no-track"]
    command = [sys.executable, "-m", "metateleport.cli", "evaluate", str(tmp_path / "flat"), "leaky_mlp", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "were not made for" in done.stderr


def test_a_result_is_written_into_the_card(tmp_path: Path) -> None:
    meta = MetaOptimizer(shape_of(mode="lr", hidden=4))
    path = save_checkpoint(tmp_path / "small", meta, None, {"results": {}})
    for width in (3, 4):
        settings = ["--set", f"width={width}", "--tasks", "2", "--steps", "3", "--methods", "learned", "--no-track"]
        assert cli.main(["evaluate", str(path), "leaky_mlp", *settings, "--card"]) == 0
    results = mt.load_checkpoint(path).card["results"]
    assert len(results) == 2
    for result in results.values():
        assert result["methods"]["learned"]["median_loss"]["3"] > 0
        assert "--card" in result["command"] or result["command"].startswith("metateleport")
    assert cli.main(["evaluate", "none", "leaky_mlp", "--card", "--no-track"]) == 2


def test_a_run_given_only_its_time_is_ended_by_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def fake(config: object, *_: object) -> Path:
        seen.append(config)
        return tmp_path

    monkeypatch.setattr("metateleport.training.train", fake)
    assert cli.main(["train", "leaky_mlp", "--seconds", "5", "--no-track"]) == 0
    assert seen[0].outer.seconds == 5  # type: ignore[attr-defined]
    assert seen[0].outer.meta_steps is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["--help", "train --help", "--version"])
def test_help_does_not_wait_for_torch(command: str) -> None:
    code = f"""
import sys
from metateleport.cli import main
try:
    main({command.split()!r})
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "metateleport" in done.stdout
