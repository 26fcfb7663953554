"""`GaugedOptimizer` saved, loaded, given more to train and given what it cannot take."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt


class Adapted(nn.Module):
    def __init__(self, starts_at: str = "lora_B") -> None:
        super().__init__()
        self.base = nn.Linear(5, 4)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
        with torch.no_grad():
            getattr(self, starts_at).zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, spoiled: int = -1) -> None:
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        if step == spoiled:
            for value in model.parameters():
                if value.grad is not None:
                    value.grad.fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", ["polar", "shampoo"])
@pytest.mark.parametrize("starts_at", ["lora_A", "lora_B"])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(starts_at: str, rule: Any) -> None:
    torch.manual_seed(0)
    whole = Adapted(starts_at)
    optimizer = mt.GaugedOptimizer(whole, rule, lr=0.05, total_steps=12)
    run(whole, optimizer, range(6), spoiled=3)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    run(whole, optimizer, range(6, 12))
    again = Adapted()
    resumed = mt.GaugedOptimizer(again, rule, lr=0.05, total_steps=12)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.skipped == 1
    assert resumed.steps == 6
    run(again, resumed, range(6, 12))
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # At the end of its length the run has stopped, the step that was left out counted.
    run(again, resumed, range(12, 13))
    assert torch.equal(again.lora_A, whole.lora_A)


def test_the_floor_is_decided_by_the_weights_that_training_starts_from() -> None:
    torch.manual_seed(0)
    made_early, made_late = Adapted("lora_B"), Adapted("lora_A")
    optimizer = mt.GaugedOptimizer(made_early, lr=0.05)
    made_early.load_state_dict(made_late.state_dict())
    run(made_early, optimizer, range(5))
    run(made_late, mt.GaugedOptimizer(made_late, lr=0.05), range(5))
    assert torch.equal(made_early.lora_B, made_late.lora_B)


def test_adapters_that_are_added_later_have_gauges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), Adapted())
    optimizer = mt.GaugedOptimizer(model, lr=0.01)
    layer = model[2]
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(5, 2))
    assert len(optimizer.pairs) == 2
    optimizer.add_param_group({"params": [layer.lora_A, layer.lora_B]})
    assert [pair.names("out") for pair in optimizer.pairs][2:] == [("2.lora_A",)]
    given = mt.GaugedOptimizer(Adapted(), symmetries=[])
    assert given.model is not None
    given.model.lora_A = nn.Parameter(torch.randn(2, 5))
    given.add_param_group({"params": [given.model.lora_A]})
    assert not given.pairs


def test_states_of_others_are_refused_before_anything_changes() -> None:
    torch.manual_seed(0)
    model = Adapted()
    polar = mt.GaugedOptimizer(model, lr=0.05)
    run(model, polar, range(2))
    before = copy.deepcopy(polar.state_dict())
    other = mt.GaugedOptimizer(Adapted(), rule="adam")
    with pytest.raises(ValueError, match=r"is of rule='polar' and the optimizer of rule='adam'"):
        other.load_state_dict(before)
    wide = nn.Linear(3, 7)
    reordered = mt.GaugedOptimizer(
        [wide.weight, wide.bias, nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2))]
    )
    with pytest.raises(ValueError, match="has moments of shape"):
        reordered.load_state_dict(before)
    with pytest.raises(ValueError, match="not a GaugedOptimizer's"):
        polar.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    assert str(polar.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": 0.9}, "betas are the memories"),
        ({"betas": (0.9, "b")}, "betas are the memories"),
        ({"lr": None}, "lr is the size"),
        ({"weight_decay": "much"}, "weight_decay is a share"),
        ({"total_steps": 2.5}, "total_steps is the number"),
        ({"total_steps": True}, "total_steps is the number"),
        ({"symmetries": 3}, "symmetries is a list"),
        ({"symmetries": ["0.weight"]}, "symmetries is a list"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mt.GaugedOptimizer(Adapted(), **settings)


def test_a_loss_that_is_none_is_named() -> None:
    model = Adapted()
    for optimizer in (mt.GaugedOptimizer(model), mt.LearnedOptimizer(model, "digits")):
        with pytest.raises(ValueError, match="takes the loss, a number"):
            optimizer.step(loss="0.3")
        assert optimizer.step(lambda: {"loss": 1.0}) == {"loss": 1.0}


def test_adapters_without_a_group_are_named() -> None:
    model = Adapted()
    model.lora_E = nn.Parameter(torch.ones(2, 1))
    with pytest.warns(UserWarning, match="adapters of AdaLoRA have something of their own"):
        mt.GaugedOptimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.GaugedOptimizer(Adapted())
