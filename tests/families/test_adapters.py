"""Adapters on frozen layers: their starts, what they train, and how their product is split."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import metateleport as mt
from metateleport.families.adapters import Adapter, adapted, pairs_of, splitting
from metateleport.torchvision import define_operators


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 3)))


def test_an_adapted_model_starts_where_the_model_was() -> None:
    plain, inputs = model(), torch.randn(4, 5)
    before = plain(inputs)
    made = adapted(plain, 2, source(), scale=10.0, condition=5.0)
    assert torch.equal(made(inputs), before)
    trained = {name for name, value in made.named_parameters() if value.requires_grad}
    assert trained == {f"{place}.lora_{factor}.weight" for place in ("0", "2.0") for factor in "AB"}


def test_every_linear_layer_has_an_adapter_once() -> None:
    made = adapted(model(), 2, source())
    assert sum(isinstance(module, Adapter) for module in made.modules()) == 2


def test_the_usual_start_is_pefts() -> None:
    define_operators()
    peft = pytest.importorskip("peft")
    starts = [adapted(model(), 4, source(seed)).get_parameter("0.lora_A.weight") for seed in range(50)]
    torch.manual_seed(0)
    config, name = peft.LoraConfig(r=4, target_modules=["0"]), "base_model.model.0.lora_A.default.weight"
    theirs = [peft.get_peft_model(model(), config).get_parameter(name) for _ in range(50)]
    own, other = (torch.cat([each.detach().flatten() for each in drawn]) for drawn in (starts, theirs))
    assert float(own.std() / other.std()) == pytest.approx(1, rel=0.05)
    assert float(own.max() / other.max()) == pytest.approx(1, rel=0.05)


def test_the_pairs_are_those_that_are_found() -> None:
    made = adapted(model().double(), 2, source())
    for adapter in made.modules():
        if isinstance(adapter, Adapter):
            nn.init.normal_(adapter.lora_B.weight)
    found = [
        each for each in mt.find_symmetries(made, torch.randn(6, 5, dtype=torch.float64)) if each.kind == "LoRA pair"
    ]
    assert [each.key for each in pairs_of(made)] == [each.key for each in found]
    assert [each.modules for each in pairs_of(made)] == [each.modules for each in found]


@pytest.mark.parametrize("rank", [1, 5])
def test_a_split_has_the_size_and_the_condition_asked_for(rank: int) -> None:
    values = torch.linalg.svdvals(splitting(rank, source(1), 3.0, 50.0))
    assert float(values.log().mean().exp()) == pytest.approx(3.0, rel=1e-4)
    assert float(values[0] / values[-1]) == pytest.approx(50.0 if rank > 1 else 1.0, rel=1e-4)
