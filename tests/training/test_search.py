"""The search for constants: it lowers the score, changes constants alone, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from rich.progress import Progress, TextColumn
from training_cases import family_of, tiny
from training_cases import small as config

import metateleport as mt
from metateleport.cli.train import _Reporter
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.tracking.trainings import TrackedTraining
from metateleport.training import Interrupted, MetaTrainer, Progression, Recipe, Unroll, train
from metateleport.training.search import constants, search_round


def trainer(settings: Recipe, meta_steps: int = 1) -> MetaTrainer:
    torch.manual_seed(0)
    outer = dataclasses.replace(settings.outer, meta_steps=meta_steps)
    validation = dataclasses.replace(settings.validation, every=min(settings.validation.every, meta_steps))
    settings = dataclasses.replace(settings, outer=outer, validation=validation)
    return MetaTrainer(settings, family_of(settings), MetaOptimizer(settings.networks(("GL",))))


@pytest.mark.parametrize("seed", range(3))
def test_it_goes_down_a_valley_from_where_it_starts(seed: int) -> None:
    meta = MetaOptimizer(shape_of(hidden=4, gauge="exact"))
    vector = torch.nn.utils.parameters_to_vector(constants(meta)).detach()
    scales = torch.linspace(0.3, 1.0, len(vector))
    aim = vector + torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))

    def score() -> float:
        return float((scales * (torch.nn.utils.parameters_to_vector(constants(meta)).detach() - aim)).square().sum())

    before = score()
    for number in range(25):
        found = search_round(meta, score, number, seed=100 * seed + number)
    assert score() < before / 10
    assert found < before / 5


def test_candidates_are_told_by_rank_alone() -> None:
    """No monotone change of the score matters, so that one diverged task does not."""
    found = []
    for change in (lambda x: x, lambda x: 1e3 * x - 7, lambda x: x**3):
        torch.manual_seed(0)
        meta = MetaOptimizer(shape_of(mode="lr", hidden=4))
        (bias,) = constants(meta)
        search_round(meta, lambda b=bias, c=change: c(float(b.detach().square().sum())), 0, seed=1)  # type: ignore[misc]
        found.append(bias.detach().clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_constants_of_every_kind_of_network() -> None:
    def count(**changes: Any) -> int:
        return sum(each.numel() for each in constants(MetaOptimizer(shape_of(hidden=4, **changes))))

    step = count(mode="lr")
    assert step == 3
    assert count(mode="lr", secants=2, cooling=0.1) == step + 2
    # Reach, share and gate of the diagonal groups and of GL.
    assert count(stays=False, gauge="exact") == step + 6
    assert count() > step
    assert count(mode="update") == step + 2
    assert count(mode="update", update="adaptive") == 6
    meta = MetaOptimizer(shape_of(mode="update", hidden=4))
    assert {id(each) for each in constants(meta)} <= {id(each) for each in meta.parameters()}


def test_a_search_comes_first_and_changes_constants_alone() -> None:
    settings = tiny(search=4)
    learning = trainer(settings)
    with torch.no_grad():
        # A step so short that anything found is better.
        learning.meta.rule.head.bias[0] = -6.0
    before = {name: value.clone() for name, value in learning.meta.state_dict().items()}
    start = learning.validation_score()
    rounds: list[int] = []

    def seen(done: Progression) -> None:
        if not done.meta_losses:
            rounds.append(len(done.searched))
            for name, value in learning.meta.state_dict().items():
                assert torch.equal(value, before[name]) != name.endswith("head.bias"), name

    learning.run(seen)
    done = learning.progression
    assert rounds == [1, 2, 3, 4]
    assert len(done.searched) == 4
    assert done.meta_step == 1
    # What was found is validated before the first meta-step, and is kept if nothing better comes.
    assert done.validations[0][0] == 0
    assert done.best <= done.validations[0][1] < start


def test_a_search_sees_training_tasks_over_the_whole_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = trainer(config(search=1, tasks=6))
    seen: list[tuple[str, int, tuple[int, ...]]] = []
    own = mt.TaskFamily.stack

    def stack(self: mt.TaskFamily, indices: Any, split: Any, seed: int, *rest: Any) -> TaskStack:
        seen.append((split, seed, tuple(indices)))
        return own(self, indices, split, seed, *rest)

    lengths: list[int] = []
    window = Unroll.window

    def measured(self: Unroll, length: int, track: bool = True) -> torch.Tensor:
        assert not track
        lengths.append(length)
        return window(self, length, track)

    monkeypatch.setattr(mt.TaskFamily, "stack", stack)
    monkeypatch.setattr(Unroll, "window", measured)
    learning._search_round()
    assert len(lengths) == len(seen)
    assert set(lengths) == {learning.outer.horizon}
    assert learning.outer.horizon > learning.outer.unroll
    training = [each for each in seen if each[0] == "train"]
    assert len(set(training)) == 4
    assert len(training) % 4 == 0
    assert {each[0] for each in seen} == {"train", "validation"}
    assert learning.progression.stack == 4


def interrupting(at: int) -> Any:
    calls = []

    def report(*_: Any) -> None:
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt

    return report


SLOW = pytest.mark.slow(seconds=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training with a search that nobody interrupted."""
    return train(tiny(search=2), tmp_path_factory.mktemp("whole") / "whole")


# Two rounds and two meta-steps of each network, and a report of each.
@pytest.mark.parametrize("at", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW), 5])
@pytest.mark.slow(seconds=2)
def test_an_interrupted_search_ends_as_if_it_had_not_been(at: int, whole: Path, tmp_path: Path) -> None:
    settings = tiny(search=2)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "part", report=interrupting(at))
    path = train(settings, tmp_path / "part", resume=True)
    assert (path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    runs = json.loads((path / "card.json").read_text())["training"]["runs"]
    assert {len(run["search"]) for run in runs.values()} == {2}


def test_every_start_is_searched_with_candidates_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def searched(_: MetaOptimizer, __: Any, number: int, seed: int) -> float:
        calls.append((number, seed))
        return 0.0

    monkeypatch.setattr("metateleport.training.trainer.search_round", searched)
    learning = trainer(config(search=2, starts=2), 3)
    learning.run()
    assert [number for number, _ in calls] == [0, 1, 0, 1]
    assert len({seed for _, seed in calls}) == 4
    assert len(learning.progression.starts) == 2


def test_rounds_and_validations_are_tracked_at_their_own_steps() -> None:
    class Tracked:
        def __init__(self) -> None:
            self.logged: dict[str, list[tuple[int, float]]] = {}

        def log(self, metrics: dict[str, float], step: int) -> None:
            for name, value in metrics.items():
                self.logged.setdefault(name, []).append((step, value))

    settings, tracked = tiny(search=2), Tracked()
    tracking = TrackedTraining(tracked)  # type: ignore[arg-type]
    learning = trainer(settings, 3)
    with Progress(TextColumn("{task.fields[status]}")) as bar:
        reporter = _Reporter(bar, tracking, settings)
        learning.run(lambda done: reporter("learned", done, 0.5))
        assert "search" not in bar.tasks[0].fields["status"]
        # A training from a checkpoint has validated what it starts from by the time of its first report.
        reporter("warm", Progression(meta_step=1, meta_losses=[0.0], validations=[[0, -1.0], [1, -2.0]]), 0.5)
    assert tracked.logged["warm/validation"] == [(0, -1.0), (1, -2.0)]
    done = learning.progression
    assert tracked.logged["learned/search"] == list(enumerate(done.searched, 1))
    assert tracked.logged["learned/validation"] == [(int(step), score) for step, score in done.validations]
    assert [step for step, _ in tracked.logged["learned/validation"]] == [0, 1, 2, 3]
    assert [step for step, _ in tracked.logged["learned/meta_loss"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"search": -1}, "outer.search has to be a number that is not negative")],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        config(**changes)


def test_a_rule_that_learns_nothing_has_no_constants() -> None:
    meta = MetaOptimizer(shape_of(mode="lr", hidden=4))
    meta.rule.head.bias = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no networks whose constants"):
        search_round(meta, lambda: 0.0, 0, 0)
