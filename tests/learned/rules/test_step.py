"""The learned step of tensors that no curvature bound is known for."""

from __future__ import annotations

import warnings

import pytest
import torch
from learned_cases import batch, meta_of
from torch import nn

import metateleport as mt
from metateleport.learned.rules.step import StepRule, _reciprocal


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("logit", [40.0, -0.5])
def test_tensors_without_a_bound_take_polyak_s_step_together_and_no_longer_one(logit: float, bounded: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    meta = meta_of(mode="lr", longest=1.5)
    assert isinstance(meta.rule, StepRule)
    with torch.no_grad():
        meta.rule.head.weight.zero_()
        meta.rule.head.bias[0] = logit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = mt.LearnedOptimizer(
            model, meta, [mt.Rescaling(model, "0", "2")] if bounded else [], deterministic=True
        )
    x, y = batch()
    loss = (model(x) - y).square().mean()
    loss.backward()
    own = {name: value for name, value in model.named_parameters() if not bounded or name.startswith("4")}
    gradients = {name: value.grad.clone() for name, value in own.items() if value.grad is not None}
    before = {name: value.detach().clone() for name, value in own.items()}
    optimizer.step(loss=loss)
    share = min(1.0, 1.5 / (1 + torch.tensor(-logit).exp().item()))
    length = share * float(loss.detach()) / sum(float(each.square().sum()) for each in gradients.values())
    for name, value in own.items():
        torch.testing.assert_close(value.detach(), before[name] - length * gradients[name], rtol=1e-6, atol=1e-9)


def test_a_loss_below_zero_is_descended_too() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = mt.LearnedOptimizer(model, meta_of(mode="lr"), [], deterministic=True)
    x, y = batch()
    loss = 0.01 * (model(x) - y).square().mean() - 0.5
    loss.backward()
    before, gradient = model.weight.detach().clone(), model.weight.grad
    assert gradient is not None
    slope = gradient.clone()
    optimizer.step(loss=loss)
    assert float(((model.weight - before) * slope).sum()) < 0


def test_where_there_is_no_curvature_there_is_no_step() -> None:
    tiny = torch.finfo(torch.float64).tiny
    assert _reciprocal(torch.tensor([0.0, tiny, 2.0], dtype=torch.float64)).tolist() == [0.0, 0.0, 0.5]
