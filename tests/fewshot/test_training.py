"""The outer loop, and learn2learn that is missing or noisy."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import Split, TaskStack, split_of
from metateleport.fewshot import (
    MetaTraining,
    MetaTrainingConfig,
    MetaTrainingError,
    MissingLearn2Learn,
    TeleportingMAML,
    adapt,
    maml,
    meta_curvature,
    meta_sgd,
)
from metateleport.fewshot.learn2learn import learn2learn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plane(mt.TaskFamily):
    """Points on a plane through the origin whose slopes are near those of all other tasks."""

    name: ClassVar[str] = "plane"
    dtype: ClassVar[torch.dtype] = torch.float64
    held: bool = True

    def sample(self, seed: int) -> mt.Task:
        model = nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.1), nn.Linear(3, 2), nn.Linear(2, 1))
        slopes = torch.tensor([[1.0], [-2.0]]) + 0.2 * torch.randn(2, 1)
        support, query = torch.randn(4, 2), torch.randn(6, 2)
        return mt.Task(
            model,
            nn.functional.mse_loss,
            (support,),
            (support @ slopes,),
            mt.symmetries_of(model),
            seed=seed,
            held_out=((query,), (query @ slopes,)) if self.held else None,
        )


def start() -> nn.Module:
    return Plane().task(0).model


LEARNERS: dict[str, Callable[[], Any]] = {
    "maml": lambda: maml(start(), 0.05),
    "meta-sgd": lambda: meta_sgd(start(), 0.05),
    "meta-curvature": lambda: meta_curvature(start(), 0.05),
    "random": lambda: TeleportingMAML(start(), 0.05, mt.RandomTeleporter(size=0.3, seed=0)),
}
SMALL = MetaTrainingConfig(meta_steps=12, tasks=3, inner_steps=2, validation_every=4, validation_tasks=5, meta_lr=0.02)


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_training_makes_adapting_better_on_held_out_tasks(name: str) -> None:
    held_out = Plane().stack(range(8), "held-out")
    learner = LEARNERS[name]()
    before = {key: value.clone() for key, value in learner.named_parameters()}
    first = adapt(learner, held_out, 2).query[:, -1].mean()
    training = MetaTraining(learner, Plane(), dataclasses.replace(SMALL, meta_steps=40, meta_lr=0.05))
    training.run()
    assert float(adapt(learner, held_out, 2).query[:, -1].mean()) < 0.5 * float(first)
    assert all(not torch.equal(value, before[key]) for key, value in learner.named_parameters())
    assert training.progress.evaluations == pytest.approx(40 * 3 * 2)
    assert training.progress.skipped == 0


def test_what_did_best_on_validation_tasks_is_kept() -> None:
    training = MetaTraining(LEARNERS["maml"](), Plane(), SMALL)
    kept: dict[int, dict[str, Tensor]] = {}
    training.run(lambda done: kept.update({done.meta_step: _copy(training.learner)}))
    done = training.progress
    assert [step for step, _ in done.validations] == [4, 8, 12]
    assert done.best == min(score for _, score in done.validations)
    assert all(torch.equal(value, kept[done.best_step][key]) for key, value in training.learner.state_dict().items())
    validation = Plane().stack(range(5), "validation")
    assert float(adapt(training.learner, validation, 2).query[:, -1].mean()) == pytest.approx(done.best)


def _copy(learner: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in learner.state_dict().items()}


def test_later_worse_validations_do_not_take_the_place_of_the_best() -> None:
    def stacks(meta_step: int) -> TaskStack:
        stack = Plane().stack(range(3))
        if meta_step >= 4:
            # From here on the tasks are the opposite of those of the validation.
            stack.full = (stack.full[0], (-stack.full[1][0],))
            assert stack.held_out is not None
            stack.held_out = (stack.held_out[0], (-stack.held_out[1][0],))
        return stack

    training = MetaTraining(LEARNERS["maml"](), Plane(), dataclasses.replace(SMALL, meta_lr=0.1), stacks)
    training.run()
    scores = [score for _, score in training.progress.validations]
    assert scores[-1] > min(scores)
    validation = Plane().stack(range(5), "validation")
    assert float(adapt(training.learner, validation, 2).query[:, -1].mean()) == pytest.approx(min(scores))


@pytest.mark.parametrize("name", ["meta-sgd", "random"])
def test_a_meta_training_that_was_stopped_goes_on_as_if_it_had_not(name: str, tmp_path: Path) -> None:
    whole = MetaTraining(LEARNERS[name](), Plane(), SMALL)
    whole.run()

    class Stop(Exception):
        pass

    def stop(done: Any) -> None:
        if done.meta_step == 7:
            raise Stop

    parts = MetaTraining(LEARNERS[name](), Plane(), SMALL)
    with pytest.raises(Stop):
        parts.run(stop)
    parts.save(tmp_path / "state")
    later = MetaTraining(LEARNERS[name](), Plane(), SMALL)
    later.restore(tmp_path / "state")
    later.run()
    assert later.progress.losses == whole.progress.losses
    assert later.progress.validations == whole.progress.validations
    assert all(torch.equal(value, whole.learner.state_dict()[key]) for key, value in later.learner.state_dict().items())


def test_a_state_that_cannot_be_gone_on_from_is_refused(tmp_path: Path) -> None:
    training = MetaTraining(LEARNERS["maml"](), Plane(), SMALL)
    with pytest.raises(MetaTrainingError, match="missing"):
        training.restore(tmp_path / "nothing")
    training.save(tmp_path / "state")
    with pytest.raises(MetaTrainingError, match="inner_steps=2, not 3"):
        MetaTraining(LEARNERS["maml"](), Plane(), dataclasses.replace(SMALL, inner_steps=3)).restore(tmp_path / "state")
    with pytest.raises(MetaTrainingError, match="another learner's"):
        MetaTraining(LEARNERS["meta-sgd"](), Plane(), SMALL).restore(tmp_path / "state")
    weights = tmp_path / "state" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(MetaTrainingError, match="damaged"):
        training.restore(tmp_path / "state")
    assert json.loads((tmp_path / "state" / "state.json").read_text())["config"]["seed"] == 0


def test_a_meta_gradient_that_is_not_finite_changes_nothing() -> None:
    def stacks(meta_step: int) -> TaskStack:
        stack = Plane().stack(range(3))
        if meta_step == 1:
            stack.full = ((stack.full[0][0] * math.inf,), stack.full[1])
        return stack

    training = MetaTraining(LEARNERS["maml"](), Plane(), SMALL, stacks)
    seen: list[dict[str, Tensor]] = []
    training.run(lambda _: seen.append(_copy(training.learner)))
    assert training.progress.skipped == 1
    assert all(torch.equal(value, seen[0][key]) for key, value in seen[1].items())
    assert all(bool(value.isfinite().all()) for value in training.learner.state_dict().values())


def test_tasks_are_of_the_training_split_and_each_is_met_once() -> None:
    training = MetaTraining(LEARNERS["maml"](), Plane(), SMALL)
    seeds = [task.seed for meta_step in range(5) for task in training.stacks(meta_step).tasks]
    assert len(set(seeds)) == 15
    assert {split_of(seed) for seed in seeds} == {"train"}
    own: Split = "validation"
    assert {split_of(task.seed) for task in training._validation.tasks} == {own}


def test_settings_that_cannot_work_are_refused() -> None:
    for field in ("meta_steps", "tasks", "inner_steps", "meta_lr", "clip", "validation_every", "validation_tasks"):
        with pytest.raises(MetaTrainingError, match=f"{field} has to be positive"):
            MetaTrainingConfig(**{field: 0})
    with pytest.raises(MetaTrainingError, match="seed"):
        MetaTrainingConfig(seed=-1)
    with pytest.raises(MetaTrainingError, match="plane have no held-out data"):
        MetaTraining(LEARNERS["maml"](), Plane(held=False), SMALL)


# learn2learn itself


@pytest.fixture
def _forgotten() -> Any:
    learn2learn.cache_clear()
    yield
    learn2learn.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_without_learn2learn_every_learner_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    for make in LEARNERS.values():
        with pytest.raises(MissingLearn2Learn, match=r"not installed: pip install 'metateleport\[learn2learn\]'"):
            make()


@pytest.mark.usefixtures("_forgotten")
def test_a_learn2learn_that_does_not_import_is_told_from_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "learn2learn.py").write_text("raise RuntimeError('half of it')\n")
    monkeypatch.delitem(sys.modules, "learn2learn", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingLearn2Learn, match=r"does not import \(RuntimeError: half of it\)"):
        learn2learn()


@pytest.mark.slow(seconds=25)
def test_learn2learn_is_imported_late_and_in_silence() -> None:
    assert importlib.util.find_spec("learn2learn") is not None
    code = """
import sys
import metateleport.fewshot
assert "learn2learn" not in sys.modules
from metateleport.fewshot.learn2learn import learn2learn
assert learn2learn().algorithms.MAML
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
