"""Models in a real store: logged, promoted, loaded by address, compared; and no code of an artifact runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import nn

import metateleport as mt
from metateleport import cli
from metateleport.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from metateleport.evaluation import BASELINES, evaluate, report_of
from metateleport.learned import MetaOptimizer
from metateleport.tracking import Run, TrackedTraining, TrackingError, promote, track_evaluation, tracking_uri
from metateleport.tracking.compared import compare
from metateleport.tracking.store import connect

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def client() -> Any:
    return connect(tracking_uri())


def checkpoint(folder: Path, seed: int = 0) -> Path:
    """A small checkpoint, with a card as trainings write it."""
    torch.manual_seed(seed)
    meta = MetaOptimizer(shape_of("lr+tele", hidden=4))
    run = {"meta_steps": 7, "chosen_at": 5, "validation": -1.5 - seed, "validations": [[5, -1.0], [7, -1.5 - seed]]}
    card = {
        "name": folder.name,
        "mode": "lr+tele",
        "family": {"name": "leaky_mlp", "settings": {"width": 4}},
        "training": {"command": "metateleport train", "runs": {"learned": {**run, "seconds": 1.0}}},
        "results": {},
        "limits": ["Small."],
    }
    return save_checkpoint(folder, meta, None, card)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint and its training's run."""
    path = checkpoint(tmp_path_factory.mktemp("runs") / "mine")
    with Run("leaky_mlp", "mine", {"outer.seed": 0}, {"kind": "train"}) as run:
        tracked = TrackedTraining(run)
        progression = type("P", (), {})()
        progression.__dict__.update(
            meta_step=5,
            skipped=0,
            seconds=1.0,
            meta_losses=[-1.0],
            validations=[[5, -1.0]],
            openness=[0.5],
            searched=[],
        )
        tracked("learned", progression)
        tracked.finish(path)
    assert run.id is not None
    return path, run.id


def same(one: Any, other: Any) -> bool:
    mine, theirs = one.learned.state_dict(), other.learned.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_training_has_curves_figures_plot_note_and_model(trained: tuple[Path, str], client: Any) -> None:
    run_id = trained[1]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/validation"] == -1.5
    history = [(point.step, point.value) for point in client.get_metric_history(run_id, "learned/validation")]
    assert history == [(5, -1.0), (7, -1.5)]
    assert run.data.metrics["learned/log10_loss"] == pytest.approx(-1.0 / 2.302585, rel=1e-6)
    assert "Small." in run.data.tags["mlflow.note.content"]
    assert [each.path for each in client.list_artifacts(run_id, "plots")] == ["plots/training.png"]
    (output,) = run.outputs.model_outputs
    assert output.step == 7
    model = client.get_logged_model(output.model_id)
    assert model.name == "mine"
    assert str(model.status) == "READY"
    assert {each.key: each.value for each in model.metrics}["final/validation"] == -1.5
    assert model.params["card.validation"] == "-1.5"
    names = {each.path for each in client.list_logged_model_artifacts(model.model_id)}
    assert {"MLmodel", "input_example.json", "artifacts"} <= names
    held = Path(model.artifact_location.removeprefix("file://"))
    assert not [each for each in held.rglob("*") if each.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")]
    assert "signature" in (held / "MLmodel").read_text()
    assert {each.name for each in (held / "artifacts" / "mine").iterdir()} >= {"card.json", "weights.safetensors"}


def test_mlflow_itself_serves_the_model(trained: tuple[Path, str]) -> None:
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    found = promote(trained[1], "served", "now")
    model = mlflow.pyfunc.load_model(found.address)
    asked = [json.dumps({"schema": 1, "ask": "about"}), json.dumps({"schema": 1, "ask": "nothing"}), "{"]
    about, wrong, broken = (json.loads(text) for text in model.predict({"request": asked})["answer"])
    assert about["name"] == "mine"
    assert wrong["error"]["field"] == "ask"
    assert broken["error"]["message"].startswith("the body is truncated")


def test_it_is_promoted_and_loaded_by_every_address(trained: tuple[Path, str], tmp_path: Path) -> None:
    path, run_id = trained
    first = promote(run_id, "lora", "champion")
    assert first.address == "models:/lora@champion"
    # Again it keeps its version, whatever it is called by.
    assert promote(path, "lora", "champion") == first == promote(f"runs:/{run_id}", "lora", "champion")
    here = load_checkpoint(path)
    for address in (
        "models:/lora@champion",
        f"models:/lora/{first.version}",
        "models:/lora",
        f"runs:/{run_id}",
        f"runs:/{run_id}/mine",
        f"models:/{first.model_id}",
    ):
        loaded = load_checkpoint(address)
        assert same(loaded, here), address
        assert loaded.name == "mine"
    assert isinstance(mt.load("models:/lora@champion"), mt.Teleporter)
    # Another takes its place, without a run of its own.
    second = promote(checkpoint(tmp_path / "other", seed=1), "lora", "champion")
    assert second.version == first.version + 1
    assert not same(load_checkpoint("models:/lora@champion"), here)
    assert same(load_checkpoint(f"models:/lora/{first.version}"), here)
    # For a model of another width, from the alias.
    model = nn.Sequential(nn.Linear(3, 50), nn.LeakyReLU(0.1), nn.Linear(50, 2))
    optimizer = mt.LearnedOptimizer(model, f"models:/lora/{first.version}")
    model(torch.randn(60, 3)).square().mean().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_no_code_of_an_artifact_runs(tmp_path: Path, client: Any) -> None:
    path = checkpoint(tmp_path / "evil", seed=3)
    found = promote(path)
    model = client.get_logged_model(found.model_id)
    held = Path(model.artifact_location.removeprefix("file://"))
    ran = tmp_path / "ran"
    for file in (held / "answering_model.py", held / "artifacts" / "evil" / "conftest.py"):
        file.write_text(f"open({str(ran)!r}, 'w')")
    (held / "artifacts" / "evil" / "weights.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (held / "MLmodel").write_text("flavors: {python_function: {loader_module: os, data: x}}")
    assert same(load_checkpoint(found.address), load_checkpoint(path))
    assert not ran.exists()
    fetched = load_checkpoint(found.address).path
    assert {each.name for each in fetched.iterdir()} <= {"card.json", "weights.safetensors", "recipe.toml"}


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("models:/nothing@champion", "cannot be fetched"),
        ("models:/nothing", "metateleport promote"),
        ("models:/a/b/c", "no address of a checkpoint"),
        ("runs:/0123456789abcdef0123456789abcdef", "cannot be fetched"),
    ],
)
def test_an_address_that_leads_nowhere_says_what_to_do(address: str, said: str) -> None:
    with pytest.raises(TrackingError, match=said):
        mt.load(address)
    assert cli.main(["show", address]) == 2


def test_what_cannot_be_promoted_is_told(trained: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        promote(tmp_path / "nothing")
    with pytest.raises(TrackingError, match="cannot be promoted"):
        promote("0123456789abcdef0123456789abcdef")
    with pytest.raises(TrackingError, match="model name"):
        promote(trained[0], "a/b")
    for alias in ("latest", "v3", "a b"):
        with pytest.raises(TrackingError, match="alias"):
            promote(trained[0], alias=alias)


def test_a_local_checkpoint_imports_no_mlflow_and_is_quick() -> None:
    code = (
        "import sys, time, torch, metateleport as mt; mt.load; "
        "start = time.process_time(); mt.load('digits'); print(time.process_time() - start); "
        "print('mlflow' in sys.modules, 'metateleport.tracking' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(found[0]) < 0.05
    assert found[1:] == ["False", "False"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    methods = [BASELINES[name].make(lr=1e-3) for name in ("gd", "adam")]
    return report_of(evaluate(mt.load_family("leaky_mlp", {"width": 4}), methods, tasks=2, steps=10))


def test_an_evaluation_is_a_child_of_its_training_and_its_methods_are_its_children(
    trained: tuple[Path, str], report: dict[str, Any], tmp_path: Path, client: Any
) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(b"")
    card = load_checkpoint(trained[0]).card
    ids = track_evaluation({**report, "checkpoint": "mine"}, [tmp_path / "a.json", tmp_path / "a.png"], card, "words")
    whole = client.get_run(ids["evaluation"])
    assert whole.data.tags["mlflow.parentRunId"] == trained[1]
    assert whole.data.tags["mlflow.note.content"] == "words"
    assert {each.path for each in client.list_artifacts(ids["evaluation"])} == {"a.json", "plots"}
    runs = [client.get_run(ids[name]) for name in ("gd", "adam")]
    assert all(run.data.tags["mlflow.parentRunId"] == ids["evaluation"] for run in runs)
    names = [set(run.data.metrics) for run in runs]
    assert names[0] == names[1] >= {"loss_median", "log10_loss_median", "final_median", "final_log10_median", "seconds"}
    assert len(client.get_metric_history(ids["gd"], "log10_loss_median")) == 11
    for run in runs:
        for tag in ("commit", "machine", "torch", "metateleport", "kind", "device"):
            assert tag in run.data.tags or tag == "commit"

    rows = [each for each in compare("leaky_mlp") if each.evaluation == whole.data.tags["evaluation"]]
    assert [each.method for each in rows] == sorted(
        ("gd", "adam"), key=lambda name: report["methods"][name]["median"][-1]
    )
    assert rows[0].settings["task.width"] == "4"


def test_evaluations_are_compared(report: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    track_evaluation({**report, "checkpoint": "none", "task": {**report["task"], "name": "compared"}})
    assert cli.main(["compare", "compared", "--png", "a.png"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "gd" in out
    assert "width=4" in out
    assert cli.main(["compare", "compared", "--json", "--methods", "gd"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["figures"]["final_median"] == pytest.approx(report["methods"]["gd"]["median"][-1])
    for wrong, said in ((["nothing"], "no evaluation on 'nothing'"), (["compared", "--methods", "x"], "'x'")):
        assert cli.main(["compare", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_promote_and_show_on_the_command_line(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["promote", str(trained[0]), "--name", "shown", "--as", "champion"]) == 0
    address = capsys.readouterr().out.strip()
    assert address == "models:/shown@champion"
    assert cli.main(["show", address]) == 0
    assert "Small." in capsys.readouterr().out
    assert cli.main(["show", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"] == ["Small."]
