"""Checkpoints of several meta-seeds: made in one run or of several, resumable, the best on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import edited
from learned_cases import shape_of
from training_cases import family_of
from training_cases import tiny as config

import metateleport as mt
from metateleport import cli
from metateleport.checkpoint import CheckpointError, load_checkpoint
from metateleport.checkpoint.seeds import combine_meta_seeds, each_meta_seed
from metateleport.evaluation import EvaluationError, FirstOrder, Seed, evaluate
from metateleport.learned import MetaOptimizer, StepSettings, TeleportSettings
from metateleport.settings import SettingsError
from metateleport.training import Interrupted, MetaTrainer, Progression, TrainingError, train
from metateleport.training.meta_seeds import seeds_folder, train_meta_seeds


def files(path: Path) -> dict[str, bytes]:
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def weights(path: Path) -> bytes:
    return (path / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("singles")
    return [train(config(seed=seed), folder / f"s{seed}") for seed in (4, 5, 6)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_meta_seeds(config(seed=4), tmp_path_factory.mktemp("together") / "c", 3)


def score(path: Path) -> float:
    return float(load_checkpoint(path).card["training"]["runs"]["learned"]["validation"])


def test_the_best_seed_lies_on_top_and_the_others_beside_it(singles: list[Path], together: Path) -> None:
    top = load_checkpoint(together)
    best = min(singles, key=score)
    assert weights(together) == weights(best)
    assert top.card["name"] == "c"
    assert [each.seed for each in top.meta_seeds] == [4, 5, 6]
    assert [each.validation for each in top.meta_seeds] == [score(path) for path in singles]
    assert sum(each.path == together for each in top.meta_seeds) == 1
    for each, single in zip(top.meta_seeds, singles, strict=True):
        assert weights(each.path) == weights(single)
        loaded = load_checkpoint(each.path)
        assert loaded.card["training"]["recipe"]["outer"]["seed"] == each.seed
        assert loaded.step_only is not None
    assert [each.path for each in each_meta_seed(top)] == [each.path for each in top.meta_seeds]
    assert mt.load(together).name == "learned"
    assert load_checkpoint(singles[0]).meta_seeds == ()
    assert not seeds_folder(together).exists()


def test_combined_is_what_one_run_would_have_made(singles: list[Path], together: Path, tmp_path: Path) -> None:
    combined = combine_meta_seeds([singles[2], singles[0], singles[1]], tmp_path / "c")
    assert {name: text for name, text in files(combined).items() if name.endswith("safetensors")} == {
        name: text for name, text in files(together).items() if name.endswith("safetensors")
    }
    assert load_checkpoint(combined).card["meta_seeds"] == load_checkpoint(together).card["meta_seeds"]
    # Those of several seeds bring all of them, and the folder may be one of those that are read.
    pair = combine_meta_seeds(singles[:2], tmp_path / "pair")
    assert files(combine_meta_seeds([pair, singles[2]], pair)).keys() == files(combined).keys()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", "pair"]


def test_what_cannot_be_combined(singles: list[Path], tmp_path: Path) -> None:
    other = train(config(seed=9, meta_steps=3), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"not of one recipe: outer.meta_steps is 2 in one and 3"):
        combine_meta_seeds([singles[0], other], tmp_path / "c")
    with pytest.raises(CheckpointError, match="both of seed 4"):
        combine_meta_seeds([singles[0], singles[0]], tmp_path / "c")
    with pytest.raises(CheckpointError, match="no checkpoints to combine"):
        combine_meta_seeds([], tmp_path / "c")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        combine_meta_seeds([singles[0], tmp_path / "gone"], tmp_path / "c")
    edited(other, lambda card: card.pop("training"))
    with pytest.raises(CheckpointError, match="how it was trained"):
        combine_meta_seeds([other], tmp_path / "c")
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("listed", [3, [3], [{"seed": 1}], [{"seed": "x", "validation": 0, "chosen": True}]])
def test_a_list_of_seeds_that_cannot_be_read_is_named(listed: Any, together: Path, tmp_path: Path) -> None:
    path = combine_meta_seeds([together], tmp_path / "c")
    edited(path, lambda card: card.update(meta_seeds=listed))
    with pytest.raises(CheckpointError, match=r"the card of .* is damaged: meta_seeds"):
        load_checkpoint(path)


def test_a_seed_that_was_not_copied_is_named_and_the_top_still_loads(together: Path, tmp_path: Path) -> None:
    path = combine_meta_seeds([together], tmp_path / "c")
    beside = next(each for each in load_checkpoint(path).meta_seeds if each.path != path)
    (beside.path / "weights.safetensors").unlink()
    mt.load(path)
    with pytest.raises(CheckpointError, match=str(beside.path)):
        each_meta_seed(load_checkpoint(path))


def interrupting(at: int) -> Callable[[str, Progression, float], None]:
    seen: list[str] = []

    def report(name: str, _: Progression, __: float) -> None:
        seen.append(name)
        if len(seen) == at:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(("at", "first"), [(1, "seed 4/learned"), (5, "seed 5/learned"), (11, "seed 6/step-only")])
def test_an_interrupted_run_goes_on_at_the_seed_it_was_at(at: int, first: str, together: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    with pytest.raises(Interrupted, match="--resume"):
        train_meta_seeds(config(seed=4), out, 3, report=interrupting(at))
    assert [each.name for each in tmp_path.iterdir()] == ["c.meta-seeds"]
    with pytest.raises(TrainingError, match=r"c\.meta-seeds holds an unfinished training: add --resume"):
        train_meta_seeds(config(seed=4), out, 3)
    with pytest.raises(TrainingError, match="meta_steps"):
        train_meta_seeds(config(seed=4, meta_steps=3), out, 3, resume=True)
    names: list[str] = []
    train_meta_seeds(config(seed=4), out, 3, resume=True, report=lambda name, *_: names.append(name))
    assert names[0] == first
    assert {name: text for name, text in files(out).items() if name.endswith("safetensors")} == {
        name: text for name, text in files(together).items() if name.endswith("safetensors")
    }
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


def test_nothing_to_train_or_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        train_meta_seeds(config(), tmp_path / "c", 2, resume=True)
    with pytest.raises(TrainingError, match="at least one meta-seed"):
        train_meta_seeds(config(), tmp_path / "c", 0)


def test_all_seeds_are_scored_on_the_same_tasks() -> None:
    family = family_of(config())
    scores = set()
    for seed in (0, 1, 7):
        torch.manual_seed(3)
        meta = MetaOptimizer(shape_of(hidden=3))
        scores.add(MetaTrainer(config(seed=seed), family, meta).validation_score())
    assert len(scores) == 1


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    settings = "family.width=3 outer.meta_steps=1 outer.tasks=2 outer.unroll=2 outer.horizon=2 validation.every=1"
    small = ["--set", *settings.split(), "--device", "cpu", "--no-track"]
    assert cli.main(["train", "leaky_mlp", *small, "--meta-seeds", "2", "--out", "five"]) == 0
    assert [each.seed for each in load_checkpoint("five").meta_seeds] == [0, 1]
    assert cli.main(["train", "leaky_mlp", *small, "--seed", "2", "--out", "one"]) == 0
    capsys.readouterr()
    assert cli.main(["combine", "five", "one", "--out", "all"]) == 0
    assert "validation scores by seed: 0: " in capsys.readouterr().err
    assert [each.seed for each in load_checkpoint("all").meta_seeds] == [0, 1, 2]
    assert cli.main(["combine", "five", "five", "--out", "all"]) == 2
    assert "both of seed 0" in capsys.readouterr().err
    assert cli.main(["combine", "five", "--out", "all/card.json"]) == 2
    assert "is a file" in capsys.readouterr().err
    own = "rule.longest=7 rule.cooling=0.3 teleport.max_stretch=2.5 gauge.kind=exact gauge.metric_memory=0.4"
    sets = ["--set", *own.split()]
    assert cli.main(["train", "leaky_mlp", *small, *sets, "--out", "bound"]) == 0
    learned = load_checkpoint("bound").learned
    assert learned.config.rule == StepSettings(longest=7.0, cooling=0.3)
    assert learned.config.teleport == TeleportSettings(max_stretch=2.5)
    assert learned.gauge is not None
    assert learned.gauge.metric_memory == 0.4


def test_evaluate_runs_the_learned_methods_of_every_seed_and_the_baselines_once(
    together: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path / "cache"))
    path = combine_meta_seeds([together], tmp_path / "c")
    ran: list[str] = []
    own = FirstOrder.run
    monkeypatch.setattr(FirstOrder, "run", lambda self, *rest: ran.append(self.name) or own(self, *rest))
    small = ["--set", "width=3", "--tasks", "3", "--steps", "14", "--no-track"]
    command = ["evaluate", str(path), "leaky_mlp", *small, "--methods", "learned,learned/step-only,gd"]
    monkeypatch.setattr("metateleport.evaluation.plan.tune", lambda rival, *_, **__: rival.make(lr=1e-3))
    assert cli.main([*command, "--json", "a.json", "--card"]) == 0
    # Once to warm up, and once.
    assert ran == ["gd", "gd"]
    report = json.loads(Path("a.json").read_text())
    assert [each["seed"] for each in report["meta_seeds"]["seeds"]] == [4, 5, 6]
    chosen = next(each for each in report["meta_seeds"]["seeds"] if each["chosen"])
    assert chosen["methods"]["learned"]["median_loss"]["12"] == report["methods"]["learned"]["median"][12]
    medians = {each["methods"]["learned"]["median_loss"]["14"] for each in report["meta_seeds"]["seeds"]}
    assert len(medians) == 3, "each seed has networks of its own"
    assert "worst of 3 meta-seeds" in capsys.readouterr().out
    (result,) = load_checkpoint(path).card["results"].values()
    assert [each["seed"] for each in result["meta_seeds"]["seeds"]] == [4, 5, 6]
    assert set(result["meta_seeds"]["worst"]["learned"]["median_loss"]) == {"12", "14"}
    assert {"worst", "ratio", "low", "high"} <= result["meta_seeds"]["ratios_to_learned"]["gd"][0].keys()
    assert cli.main([*command, "--json", "b.json", "--meta-seeds", "best"]) == 0
    best = json.loads(Path("b.json").read_text())
    assert best["meta_seeds"] == {}
    assert best["methods"]["learned"]["median"] == report["methods"]["learned"]["median"]


def test_of_several_seeds_one_is_the_chosen_one() -> None:
    family = mt.load_family("leaky_mlp", {"width": 3})
    gd = FirstOrder("gd", lr=1e-3)
    with pytest.raises(EvaluationError, match="has to have no methods here"):
        evaluate(family, [gd], tasks=1, steps=2, meta_seeds=[Seed(0, 0.0), Seed(1, 0.0)])


def test_seeds_that_go_beyond_the_last_are_refused_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"outer\.seed"):
        train_meta_seeds(config(seed=2**63 - 1), tmp_path / "c", 2)
    assert not seeds_folder(tmp_path / "c").exists()
