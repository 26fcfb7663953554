"""The checkpoint that is taken where none is given."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import metateleport as mt
from metateleport.checkpoint import shipped_checkpoints
from metateleport.optim.choice import DEFAULT, LORA, choose


def adapted(train: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)
    model[0].lora_A, model[0].lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
    return model if train else model.requires_grad_(False)


def test_any_model_gets_the_default() -> None:
    assert choose(nn.LSTM(3, 4)).checkpoint == choose(None).checkpoint == DEFAULT
    assert DEFAULT in shipped_checkpoints()


def test_adapters_get_what_was_learned_on_adapters_if_it_is_there() -> None:
    assert choose(adapted(), [DEFAULT, LORA]).checkpoint == LORA
    assert choose(adapted(), [DEFAULT]).checkpoint == DEFAULT
    assert choose(adapted(train=False), [DEFAULT, LORA]).checkpoint == DEFAULT


def test_the_optimizer_takes_it_without_a_word() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = mt.LearnedOptimizer(model)
        by_name = mt.LearnedOptimizer(model, DEFAULT)
        of_parameters = mt.LearnedOptimizer(model.parameters())
    for one in (chosen, of_parameters):
        assert all(torch.equal(*pair) for pair in zip(one.meta.parameters(), by_name.meta.parameters(), strict=True))
