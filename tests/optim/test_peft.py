"""PEFT as people use it, with learned optimizers and teleports: what is served, and what it does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.torchvision import define_operators

INPUTS = torch.randint(12, (24, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


class Small(nn.Module):
    """Queries and values of a bag of embeddings, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.q, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head((torch.relu(self.q(h)) * self.v(h)).mean(1))


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    define_operators()
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], **settings})
    model = peft.get_peft_model(Small().to(dtype), config)
    # As after some training: at B = 0 any action on it looks right.
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.3)
    return model


def several() -> Any:
    model = adapted()
    peft = pytest.importorskip("peft")
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q", "v"]))
    for layer in (model.base_model.model.q, model.base_model.model.v):
        nn.init.normal_(layer.lora_B["other"].weight, std=0.3)
    model.set_adapter("other")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "q and v": adapted,
    "q only": lambda: adapted(target_modules=["q"]),
    "dropout": lambda: adapted(lora_dropout=0.3),
    "rank pattern": lambda: adapted(rank_pattern={"v": 4}),
    "modules to save": lambda: adapted(modules_to_save=["head"]),
    "bf16 base": lambda: adapted(torch.bfloat16),
    "DoRA": lambda: adapted(use_dora=True),
    "several": several,
}
models = pytest.mark.parametrize("name", MODELS)


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(INPUTS).float(), LABELS)


def trained_with(optimizer: Any, model: nn.Module, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@models
def test_a_teleport_keeps_the_outputs_and_moves_what_is_trained_alone(name: str) -> None:
    model = MODELS[name]().eval()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    outputs = model(INPUTS).detach()
    still = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.0)
    teleporter = mt.RandomTeleporter(0.5, seed=0)
    optimizer = mt.TeleportingOptimizer(still, model, teleporter, every=1, example_input=INPUTS)
    found = [symmetry for symmetry in optimizer.symmetries if symmetry.kind == "LoRA pair"]
    assert len(found) == (1 if name == "q only" else 2)
    trained_with(optimizer, model, 2)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    active = "other" if name == "several" else "default"
    assert {key for key in moved if "lora_" in key} == {
        key for key, value in before.items() if "lora_" in key and f".{active}." in key and "magnitude" not in key
    }
    assert all(before[key].requires_grad or model.get_parameter(key).requires_grad for key in moved)
    tolerance = 0.05 if name == "bf16 base" else 1e-4
    torch.testing.assert_close(model(INPUTS), outputs, rtol=tolerance, atol=tolerance)


@models
@pytest.mark.parametrize("kind", ["learned", "teleporting"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(name: str, kind: str) -> None:
    model = MODELS[name]()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    with warnings.catch_warnings():
        # A checkpoint may say that it moves nothing here.
        warnings.simplefilter("ignore", UserWarning)
        optimizer: Any
        if kind == "learned":
            optimizer = mt.LearnedOptimizer(model, "bottleneck_digits", example_input=INPUTS)
        else:
            adam = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.02)
            teleporter = mt.WhiteningTeleporter("balanced", damping=1e-3)
            optimizer = mt.TeleportingOptimizer(adam, model, teleporter, every=5, example_input=INPUTS)
        losses = trained_with(optimizer, model, 25)
    assert min(losses[-5:]) < losses[0] - 0.02, losses
    for key, value in model.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, before[key]), key
        assert bool(value.isfinite().all())


def test_a_disabled_adapter_is_the_base_and_comes_back() -> None:
    model = adapted()
    adam = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.02)
    teleporter = mt.RandomTeleporter(0.5, seed=0)
    optimizer = mt.TeleportingOptimizer(adam, model, teleporter, every=2, example_input=INPUTS)
    with model.disable_adapter():
        base = model(INPUTS).detach()
    trained_with(optimizer, model, 3)
    with model.disable_adapter():
        torch.testing.assert_close(model(INPUTS), base)
    assert not torch.allclose(model(INPUTS), base, atol=1e-3)
    trained_with(optimizer, model, 3)


def test_merging_after_training_keeps_the_outputs() -> None:
    model = adapted()
    trained_with(mt.GaugedOptimizer(model, lr=0.02), model, 3)
    outputs = model(INPUTS).detach()
    torch.testing.assert_close(model.merge_and_unload()(INPUTS), outputs, rtol=1e-4, atol=1e-5)
