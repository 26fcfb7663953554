"""Steps of one small task in numpy are those that tensors of a stack take."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.rules import adaptive
from metateleport.learned.rules.adaptive import AdaptiveSettings
from metateleport.learned.rules.mixture import Ledger
from metateleport.learned.rules.static import StaticSettings

RULES = {
    "static": StaticSettings(cooling=0.01, guarded=True),
    "unguarded": StaticSettings(),
    "adaptive": AdaptiveSettings(hidden=4, cooling=0.01),
    "told": AdaptiveSettings(hidden=4, told=True, guarded=True),
}


class Model(nn.Module):
    """A table, a kernel with a bias in front of a norm, tall and wide matrices, a scalar, a layer of some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.kernel = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))
        self.now_and_then = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, more: bool) -> Tensor:
        x = self.norm(self.kernel(self.table(tokens).mT)).mT
        x = x + self.inner(x)
        if more:
            x = x + self.now_and_then(x).tanh()
        return self.head(self.scale * x).mean(1)


def meta_optimizer(settings: AdaptiveSettings | StaticSettings) -> MetaOptimizer:
    torch.manual_seed(0)
    meta = MetaOptimizer(MetaOptimizerConfig(settings, teleport=None))
    with torch.no_grad():
        # As trained networks do, they tell tensors apart.
        meta.rule.get_parameter("head.weight").normal_(0.0, 0.2)
    return meta


def trained(
    meta: Any,
    dtype: torch.dtype = torch.float64,
    steps: int = 25,
    told: bool = False,
    between: Callable[[mt.LearnedOptimizer], mt.LearnedOptimizer] | None = None,
    **options: Any,
) -> tuple[Tensor, mt.LearnedOptimizer]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer = mt.LearnedOptimizer(model, copy.deepcopy(meta), total_steps=40, **options)
    tokens, targets = torch.randint(7, (16, 5)), torch.randint(3, (16,))
    for step in range(steps):
        # The tensors of this step are those of the one before.
        if step == 11 and between is not None:
            optimizer = between(optimizer)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens, more=step % 3 > 0), targets)
        # A loss that jumps: where it is told, the step before is taken back.
        loss = loss * (1e4 if step == 15 else 1.0)
        loss.backward()
        optimizer.step(**({"loss": loss} if told else {}))
    return torch.cat([value.detach().flatten() for value in model.parameters()]), optimizer


def in_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "serves", staticmethod(lambda _: False))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_weights_are_those_thbetweensors_give(name: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, options = meta_optimizer(RULES[name]).double(), {"lr": 0.7, "weight_decay": 1e-3}
    ours, optimizer = trained(meta, told=told, **options)
    assert optimizer.loop.state is not None
    assert optimizer.meta.rule._ledgers
    assert bool(optimizer.loop.state.progress.rejected > 0) == told
    in_tensors(monkeypatch)
    theirs, other = trained(meta, told=told, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert other.loop.state is not None
    for key, value in optimizer.loop.state.rule.items():
        torch.testing.assert_close(value, other.loop.state.rule[key], rtol=1e-7, atol=1e-12, msg=key)
    assert optimizer.model is not None
    assert other.model is not None
    for (key, one), two in zip(optimizer.model.named_parameters(), other.model.parameters(), strict=True):
        assert optimizer.state[one].keys() == other.state[two].keys()
        # What a network reads of the bias in front of the norm, whose gradients are rounding, is rounding too.
        if key == "kernel.bias" and "cells.0" in optimizer.state[one]:
            continue
        for entry, value in optimizer.state[one].items():
            torch.testing.assert_close(value, other.state[two][entry], rtol=1e-7, atol=1e-12, msg=f"{key} {entry}")


def test_in_single_precision_they_agree_to_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = meta_optimizer(RULES["static"])
    ours, optimizer = trained(meta, torch.float32, steps=5)
    assert optimizer.meta.rule._ledgers
    in_tensors(monkeypatch)
    theirs, _ = trained(meta, torch.float32, steps=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def saved_and_loaded(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    assert optimizer.model is not None
    other = mt.LearnedOptimizer(optimizer.model, optimizer.meta, total_steps=40)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def loaded_in_place(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def cleared(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    optimizer.state[optimizer.param_groups[0]["params"][0]].clear()
    return optimizer


def laid_elsewhere(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    for entries in optimizer.state.values():
        for value in entries.values():
            value.data = value.data.clone()
    return optimizer


def one_exchanged(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    entries = optimizer.state[optimizer.param_groups[0]["params"][-1]]
    entries["squares"] = 4 * entries["squares"]
    return optimizer


def shared(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    for entries in optimizer.state.values():
        entries["momentum"].share_memory_()
    return optimizer


def overwritten(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
    for entries in optimizer.state.values():
        entries["momentum"] = entries["momentum"] * 2
        entries["squares"].mul_(4)
    return optimizer


@pytest.mark.parametrize("name", ["static", "adaptive"])
@pytest.mark.parametrize(
    "between", [saved_and_loaded, loaded_in_place, laid_elsewhere, shared, cleared, overwritten, one_exchanged]
)
def test_what_is_remembered_may_be_exchanged(between: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = meta_optimizer(RULES[name]).double()
    ours, optimizer = trained(meta, between=between)
    assert optimizer.meta.rule._ledgers
    unchanged, _ = trained(meta)
    in_tensors(monkeypatch)
    theirs, _ = trained(meta, between=between)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours, unchanged) == (between not in (cleared, overwritten, one_exchanged))


def test_optimizers_of_one_meta_optimizer_do_not_share_memory() -> None:
    meta, targets = meta_optimizer(RULES["static"]), (1.0, -1.0)

    def run(together: bool) -> list[Tensor]:
        models = [nn.Linear(2, 2) for _ in targets]
        for seed, model in enumerate(models):
            nn.init.constant_(model.weight, seed + 1.0)
            nn.init.zeros_(model.bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metas = [meta, meta] if together else [copy.deepcopy(meta) for _ in targets]
            optimizers = [mt.LearnedOptimizer(model, own) for model, own in zip(models, metas, strict=True)]
        for _ in range(6):
            for model, optimizer, target in zip(models, optimizers, targets, strict=True):
                optimizer.zero_grad()
                (model(torch.eye(2)) - target).square().mean().backward()
                optimizer.step()
        return [model.weight.detach() for model in models]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    assert len(meta.rule._ledgers) == 2


def made(monkeypatch: pytest.MonkeyPatch) -> list[Ledger]:
    """The ledgers that are made from now on."""
    found: list[Ledger] = []
    start = Ledger.__init__

    def spied(self: Ledger, *given: Any) -> None:
        found.append(self)
        start(self, *given)

    monkeypatch.setattr(Ledger, "__init__", spied)
    return found


def test_a_ledger_serves_until_other_tensors_are_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers = made(monkeypatch)
    trained(meta_optimizer(RULES["static"]), torch.float32, steps=3)
    # The layer of some steps only is left out in the first one, and then comes in.
    assert len(ledgers) == 2
    meta, ledgers[:] = meta_optimizer(RULES["static"]), []
    optimizers = []
    for _ in range(6):
        model = nn.Linear(3, 2)
        optimizers.append((model, mt.LearnedOptimizer(model, meta)))
    for _ in range(3):
        for model, optimizer in optimizers[:3]:
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
    assert len(ledgers) == 3
    for model, optimizer in optimizers:
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    assert len(meta.rule._ledgers) == 4


@pytest.mark.parametrize("kind", ["plain", "lr=0", "short", "decay", "told", "half", "complex", "not finite"])
@pytest.mark.parametrize("name", ["static", "adaptive"])
def test_a_single_tensor_steps_as_several_do(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"lr=0": {"lr": 0.0}, "short": {"lr": 0.1}, "decay": {"weight_decay": 0.1}}.get(kind, {})
    dtype = {"half": torch.bfloat16, "complex": torch.complex128}.get(kind, torch.float64)

    def run() -> tuple[Tensor, mt.LearnedOptimizer]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 4).to(dtype) * (1e150 if kind == "not finite" else 1.0))
        optimizer, x = mt.LearnedOptimizer([weight], copy.deepcopy(meta), **options), torch.randn(8, 4)
        for step in range(8):
            optimizer.zero_grad()
            loss = (x.to(dtype) @ weight.mT).abs().float().square().mean() * (
                1e4 if step == 5 and kind == "told" else 1
            )
            loss.backward()
            optimizer.step(**({"loss": loss} if kind == "told" else {}))
        return torch.view_as_real(weight.detach()) if kind == "complex" else weight.detach(), optimizer

    meta = meta_optimizer(RULES[name]).double()
    ours, optimizer = run()
    assert kind == "not finite" or optimizer.meta.rule._ledgers
    in_tensors(monkeypatch)
    theirs, other = run()
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if kind == "half" else 1e-9, atol=1e-9)
    assert optimizer.skipped == other.skipped


@pytest.mark.parametrize("how", ["assigned", "data", "in place"])
def test_networks_may_be_exchanged_in_mid_run(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(optimizer: mt.LearnedOptimizer) -> mt.LearnedOptimizer:
        head = optimizer.meta.rule.get_submodule("head")
        values = {key: value + 0.1 for key, value in head.state_dict().items()}
        if how == "assigned":
            head.load_state_dict(values, assign=True)
        for key, value in values.items():
            if how == "data":
                head.get_parameter(key).data = value
            elif how == "in place":
                head.get_parameter(key).data.copy_(value)
        return optimizer

    meta = meta_optimizer(RULES["static"]).double()
    ours, _ = trained(meta, between=exchanged)
    assert not torch.equal(ours, trained(meta)[0])
    in_tensors(monkeypatch)
    torch.testing.assert_close(ours, trained(meta, between=exchanged)[0], rtol=1e-9, atol=1e-12)


def test_ledgers_are_neither_copied_nor_pickled() -> None:
    _, optimizer = trained(meta_optimizer(RULES["static"]), torch.float32, steps=2)
    assert optimizer.meta.rule._ledgers
    assert not copy.deepcopy(optimizer.meta).rule._ledgers


@pytest.mark.parametrize(
    "gradients",
    [
        {"a": torch.ones(2, 3)},
        {"a": torch.ones(1, 3), "b": torch.ones(1, 3).double()},
        {"a": torch.ones(1, 3).half()},
        {"a": torch.ones(1, 3), "b": torch.ones(1, 0)},
        {"a": torch.ones(1, 2**18), "b": torch.ones(1, 3)},
        {"a": torch.ones(1, 2**18 + 1)},
    ],
)
def test_what_it_does_not_serve(gradients: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert Ledger.serves({"a": torch.ones(1, 3), "b": torch.ones(1)})
        assert not Ledger.serves(gradients)
    assert not Ledger.serves({"a": torch.ones(1, 3)})
    assert adaptive.Ledger is Ledger
