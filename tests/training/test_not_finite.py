"""What is not finite in meta-training is skipped, counted, and spoils nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import Tensor
from training_cases import family_of, trainer
from training_cases import small as config

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer
from metateleport.training import (
    Unroll,
    train,
)

NOT_FINITE = '''
import dataclasses
from typing import ClassVar
import torch
from torch import nn
from metateleport import LinearPair, Task, TaskFamily

@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoilt(TaskFamily):
    """Some tasks have no finite loss."""
    name: ClassVar[str] = "spoilt"
    every: int = 1

    def sample(self, seed):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        x, y = torch.randn(5, 3), torch.randn(5, 3)
        if (seed // 4) % self.every == 0:
            y = y * float("nan")
        return Task(model, nn.functional.mse_loss, (x,), (y,), symmetries=[LinearPair(model, "0", "1")], seed=seed)
'''


@pytest.mark.parametrize("mode", ["lr+tele", "update+tele"])
def test_meta_steps_that_are_not_finite_are_skipped_and_counted(mode: str, tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(NOT_FINITE)
    settings = config(family=str(tmp_path / "spoilt.py"), settings={}, mode=mode, meta_steps=3)
    spoilt = trainer(settings)
    before = [value.clone() for value in spoilt.meta.parameters()]
    spoilt.run()
    assert spoilt.progression.skipped == 3
    assert all(torch.equal(value, old) for value, old in zip(spoilt.meta.parameters(), before, strict=True))
    assert math.isfinite(spoilt.progression.best)
    path = train(settings, tmp_path / "a")
    card = json.loads((path / "card.json").read_text(), parse_constant=pytest.fail)
    assert card["training"]["runs"]["learned"]["skipped"] == 3


@pytest.mark.parametrize("mode", ["lr", "lr+tele", "update+tele", "tele"])
def test_a_spoilt_task_spoils_no_other(mode: str, tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(NOT_FINITE)
    settings = config(family=str(tmp_path / "spoilt.py"), settings={"every": 3}, mode=mode)
    spoilt = trainer(settings)
    family = family_of(settings)
    stack = family.stack(range(9))
    broken = [bool(target.isnan().any()) for target in stack.full[1][0]]
    assert 0 < sum(broken) < 9
    good = family.stack([index for index, bad in enumerate(broken) if not bad])

    def gradient(tasks: TaskStack) -> Tensor:
        losses = Unroll(tasks, spoilt.meta).window(4)
        finite = losses.isfinite()
        assert int(finite.sum()) == 4 * len(good)
        found = torch.autograd.grad(
            torch.where(finite, losses, 0.0).sum(), list(spoilt.meta.parameters()), allow_unused=True
        )
        return torch.cat([each.flatten() for each in found if each is not None])

    alone = gradient(good)
    assert bool(alone.any())
    assert torch.allclose(gradient(stack), alone, rtol=1e-3, atol=1e-5 * float(alone.norm()))
    spoilt.run()
    assert spoilt.progression.skipped == 0


def test_a_task_that_diverges_on_its_way_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation after the second step is not finite for the first task."""
    family = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
    meta, stack = MetaOptimizer(shape_of(hidden=4)), family.stack(range(3))
    own, steps = TaskStack.batch, []

    def batch(self: TaskStack, step: int) -> Any:
        inputs, targets = own(self, step)
        steps.append(step)
        if step == 2:
            spoilt = targets[0].clone()
            spoilt[0] = float("nan")
            targets = (spoilt,)
        return inputs, targets

    monkeypatch.setattr(TaskStack, "batch", batch)
    losses = Unroll(stack, meta).window(4)
    assert (~losses.isfinite()).nonzero().tolist() == [[1, 0]]
    torch.where(losses.isfinite(), losses, 0.0).sum().backward()
    for name, value in meta.named_parameters():
        assert value.grad is None or bool(value.grad.isfinite().all()), name
    assert steps == [0, 1, 2, 3, 4]
