"""Meta-steps: which networks are kept, when they go back, tasks and horizon."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import small as config
from training_cases import trainer

import metateleport as mt
from metateleport.families import TaskStack, split_of
from metateleport.training import (
    MetaTrainer,
    Progression,
    Unroll,
)


@pytest.mark.parametrize("mode", ["lr", "lr+tele"])
def test_a_few_meta_steps_lower_the_validation_score(mode: str) -> None:
    learning = trainer(config(mode=mode, meta_steps=16, unroll=4, horizon=4, lr=4e-2, validation_every=8))
    before = learning.validation_score()
    learning.run()
    done = learning.progression
    assert done.meta_step == 16
    assert done.skipped == 0
    assert done.best < before - 0.1


def test_the_best_of_several_starts_goes_on() -> None:
    shape = {"width": 4, "activation": "identity"}
    settings = config(starts=3, meta_steps=9, validation_every=1, validation_tasks=2, horizon=4, settings=shape)
    learning = trainer(settings)
    begun: dict[int, list[bytes]] = {}

    def seen(done: Progression) -> None:
        weight = learning.meta.rule.head.weight.detach().clone()
        begun.setdefault(done.start, []).append(weight.numpy().tobytes())

    learning.run(seen)
    done = learning.progression
    assert len(done.starts) == 3
    assert len(set(done.starts)) == 3
    assert [len(begun[start]) for start in range(3)] == [3, 3, 3]
    assert len(begun[3]) == 6
    assert done.meta_step == 9
    # What goes on has the course of the best one behind it.
    assert min(score for step, score in done.validations if step <= 3) == min(done.starts)
    alone = trainer(dataclasses.replace(settings, outer=dataclasses.replace(settings.outer, starts=1)))
    alone.run()
    first = [score for step, score in alone.progression.validations if step <= 3]
    assert min(first) == done.starts[0]


def test_the_best_on_validation_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([3.0, 1.0, 2.0])
    kept: list[dict[str, Tensor]] = []

    def scored(self: MetaTrainer) -> float:
        kept.append({name: value.clone() for name, value in self.meta.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(MetaTrainer, "validation_score", scored)
    learning = trainer(config())
    learning.run()
    assert learning.progression.validations == [[2, 3.0], [4, 1.0], [6, 2.0]]
    assert (learning.progression.best, learning.progression.best_step) == (1.0, 4)
    best = learning.best_meta().state_dict()
    assert all(torch.equal(value, best[name]) for name, value in kept[1].items())
    assert not all(torch.equal(value, best[name]) for name, value in kept[2].items())


def test_training_that_has_wandered_off_goes_back_with_a_smaller_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([-10.0, -9.5, -4.0, -9.8])
    seen: list[dict[str, Tensor]] = []

    def scored(self: MetaTrainer) -> float:
        seen.append({name: value.clone() for name, value in self.meta.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(MetaTrainer, "validation_score", scored)
    learning = trainer(config(meta_steps=4, validation_every=1))
    rates: list[float] = []
    weights_after: list[dict[str, Tensor]] = []

    def report(_: Any) -> None:
        rates.append(learning.optimizer.param_groups[0]["lr"])
        weights_after.append({name: value.clone() for name, value in learning.meta.state_dict().items()})

    learning.run(report)
    # Half a nat is not far off; six are.
    assert learning.progression.returns == 1
    assert all(torch.equal(value, seen[1][name]) for name, value in weights_after[1].items())
    assert all(torch.equal(value, seen[0][name]) for name, value in weights_after[2].items())
    assert any(not torch.equal(value, seen[0][name]) for name, value in seen[2].items())
    full = [0.55 + 0.45 * math.cos(math.pi * step / 4) for step in range(4)]
    assert rates[1] == pytest.approx(learning.outer.lr * full[1])
    assert rates[3] == pytest.approx(0.7 * learning.outer.lr * full[3])
    # What Adam had gathered on the way off is gone: one step since.
    assert {float(state["step"]) for state in learning.optimizer.state.values()} == {1.0}


def test_the_end_is_validated_too() -> None:
    learning = trainer(config(meta_steps=3, validation_every=2))
    learning.run()
    assert [step for step, _ in learning.progression.validations] == [2, 3]


def test_training_and_validation_never_share_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    own = mt.TaskFamily.stack

    def stack(self: mt.TaskFamily, indices: Any, split: str = "train", *rest: Any) -> TaskStack:
        made = own(self, indices, split, *rest)  # type: ignore[arg-type]
        seen.setdefault(split, set()).update(task.seed for task in made.tasks)
        return made

    monkeypatch.setattr(mt.TaskFamily, "stack", stack)
    learning = trainer(config())
    learning.run()
    assert set(seen) == {"train", "validation"}
    assert not seen["train"] & seen["validation"]
    for split, seeds in seen.items():
        assert {split_of(seed) for seed in seeds} == {split}
    # Every stack is of new tasks.
    assert len(seen["train"]) == 3 * learning.progression.stack
    assert len(seen["validation"]) == 4


def test_the_horizon_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    own = Unroll.window

    def window(self: Unroll, length: int, track: bool = True, loss_known: bool = True) -> Tensor:
        losses = own(self, length, track, loss_known)
        if track:
            if self.steps == length:
                lengths.append(0)
            lengths[-1] = self.steps
        return losses

    monkeypatch.setattr(Unroll, "window", window)
    trainer(config(mode="lr", meta_steps=24, unroll=2, horizon=8, validation_every=24)).run()
    assert lengths[0] == 2
    assert max(lengths) == 8
    assert lengths[:-1] == sorted(lengths[:-1])
    # The full horizon from the middle of the run on.
    assert lengths.count(8) >= 3


@pytest.mark.parametrize("mode", ["lr+tele", "update+tele"])
def test_parts_of_a_stack_give_the_meta_gradient_of_the_whole(mode: str) -> None:
    gradients, losses = [], []
    for some in (None, 2):
        settings = {"width": 4, "activation": "identity", "distribution": "normal"}
        small = {"tasks": 5, "tasks_at_once": some, "meta_steps": 1, "validation_every": 1, "blind": 0.0}
        learning = trainer(config(mode=mode, settings=settings, **small))
        learning.meta.double()
        learning.run()
        gradients.append([value.grad for value in learning.meta.parameters()])
        losses += learning.progression.meta_losses
    # Tasks amplify rounding, which depends on how many stand side by side.
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-8 * float(whole.abs().max()))
