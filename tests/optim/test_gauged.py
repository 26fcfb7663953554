"""`GaugedOptimizer`: no step depends on how a product is split, and it steps any tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metateleport as mt
from metateleport.detection import adapter_pairs
from metateleport.gauges import DIRECTIONS
from metateleport.optim.gauged import GaugedOptimizer
from metateleport.symmetries import AttentionQK, AttentionVO, LoRAPair


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def element(size: int, seed: int, condition: float, scale: float) -> Tensor:
    left, right = (torch.linalg.qr(drawn(size, size, seed=seed + shift))[0] for shift in (11, 12))
    values = torch.logspace(-math.log10(condition) / 2, math.log10(condition) / 2, size, dtype=torch.float64)
    return scale * left @ torch.diag(values) @ right


class Adapter(nn.Module):
    """A frozen layer with a low-rank adapter, a tanh and a plain layer behind it."""

    def __init__(self, zero: bool = True) -> None:
        super().__init__()
        self.base = nn.Parameter(drawn(7, 9, seed=1) / 3, requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(drawn(3, 9, seed=2) / 3), nn.Parameter(drawn(7, 3, seed=3) * (not zero))
        self.head = nn.Parameter(drawn(2, 7, seed=4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.base + self.lora_B @ self.lora_A).T) @ self.head.T


class Attention(nn.Module):
    """Two heads, written out."""

    def __init__(self) -> None:
        super().__init__()
        for number, name in enumerate(("q", "k", "v", "o")):
            layer = nn.Linear(6, 6, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(drawn(6, 6, seed=number) / 2)
                layer.bias.copy_(drawn(6, seed=number) / 4)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 100, **settings: Any) -> nn.Module:
    optimizer = GaugedOptimizer(model, **{"lr": 0.02, "total_steps": steps + 1, **settings})
    for step in range(steps):
        batch = torch.arange(8) + 8 * (step % 4)
        (model(x[batch]) - y[batch]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("rule", DIRECTIONS)
@pytest.mark.parametrize("zero", [True, False])
def test_the_split_of_an_adapter_makes_no_difference(rule: Any, zero: bool) -> None:
    x, y = drawn(32, 9), drawn(32, 2, seed=9)
    settings: dict[str, Any] = {"rule": rule, **({"lr": 0.05} if rule == "descent" else {}), "weight_decay": 0.1}
    plain = trained(Adapter(zero), x, y, **settings)
    want = plain.lora_B @ plain.lora_A
    want = want.detach()
    assert float(want.norm()) > 0.1
    for seed, (condition, scale) in enumerate([(1.0, 1e-2), (1.0, 1e2), (1e4, 3.0)]):
        model, g = Adapter(zero), element(3, seed, condition, scale)
        with torch.no_grad():
            model.lora_A.copy_(g @ model.lora_A)
            model.lora_B.copy_(model.lora_B @ torch.linalg.inv(g))
        trained(model, x, y, **settings)
        apart = float((model.lora_B @ model.lora_A - want).norm() / want.norm())
        assert apart < 1e-8, (condition, scale, apart)
        assert float((model.head - plain.head).norm()) < 1e-8


def test_without_the_gauge_the_split_does_make_a_difference() -> None:
    x, y = drawn(32, 9), drawn(32, 2, seed=9)
    products = []
    for scale in (1.0, 10.0):
        model = Adapter()
        with torch.no_grad():
            model.lora_A.mul_(scale)
        trained(model, x, y, gauge="identity")
        products.append(model.lora_B @ model.lora_A)
    assert float((products[0] - products[1]).norm()) > 0.01


@pytest.mark.parametrize("rule", ["polar", "shampoo"])
def test_the_split_of_heads_and_of_a_linear_pair_makes_no_difference(rule: Any) -> None:
    x, y = drawn(32, 5, 6), drawn(32, 5, 6, seed=9)

    def found(model: nn.Module) -> list[mt.Symmetry]:
        return [*AttentionQK.of_heads(model, "q", "k", 2), *AttentionVO.of_heads(model, "v", "o", 2)]

    one, other = Attention(), Attention()
    point = mt.point.Point({name: value.detach() for name, value in other.named_parameters()})
    for seed, symmetry in enumerate(found(other)):
        point = symmetry.act(element(3, seed, 1e3, 3.0), point)
    with torch.no_grad():
        for name, value in other.named_parameters():
            value.copy_(point.parameters[name])
    for model in (one, other):
        trained(model, x, y, rule=rule, symmetries=found(model))
    assert float((one(x) - other(x)).norm() / one(x).norm()) < 1e-8
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 2)).double()
    twin = nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 2)).double()
    g = element(3, 5, 1e4, 10.0)
    with torch.no_grad():
        twin[0].weight.copy_(g @ pair[0].weight)
        twin[0].bias.copy_(g @ pair[0].bias)
        twin[1].weight.copy_(pair[1].weight @ torch.linalg.inv(g))
        twin[1].bias.copy_(pair[1].bias)
    x, y = drawn(32, 9), drawn(32, 2, seed=9)
    for model in (pair, twin):
        trained(model, x, y, rule=rule)
    assert float((pair(x) - twin(x)).norm() / pair(x).norm()) < 1e-8


@pytest.mark.parametrize("rule", DIRECTIONS)
def test_an_adapter_leaves_zero_and_learns(rule: Any) -> None:
    x = drawn(32, 9)
    y = Adapter()(x).detach() + 0.3
    model = Adapter()
    before = float((model(x) - y).square().mean())
    trained(model, x, y, rule=rule, lr=0.2 if rule == "descent" else 0.02)
    assert float((model(x) - y).square().mean()) < 0.5 * before
    assert bool(model.lora_B.any())


class _Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += any(each in str(function) for each in ("_local_scalar_dense", "is_nonzero", "aten.nonzero"))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("rule", DIRECTIONS)
def test_a_step_never_waits_for_the_device(rule: Any) -> None:
    model = Adapter()
    optimizer = GaugedOptimizer(model, rule)
    waits = []
    for _ in range(2):
        model(drawn(4, 9)).square().mean().backward()
        with _Waits() as seen:
            optimizer.step()
        waits.append(seen.count)
    assert waits[1] == 0


@pytest.mark.parametrize("freeze", ["lora_A", "lora_B"])
def test_a_frozen_factor_still_makes_the_gauge_of_the_other(freeze: str) -> None:
    x, y = drawn(32, 9), drawn(32, 2, seed=9)
    outputs = []
    for scale in (1.0, 30.0):
        model = Adapter(zero=False)
        with torch.no_grad():
            model.lora_A.mul_(scale)
            model.lora_B.div_(scale)
        model.get_parameter(freeze).requires_grad_(False)
        outputs.append(trained(model, x, y, steps=20)(x))
    assert float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 1e-8


def test_tensors_without_a_gauge_step_like_muon_with_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin.load_state_dict(model.state_dict())
    ours = GaugedOptimizer(model, lr=0.01, symmetries=[])
    matrices = [value for value in twin.parameters() if value.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=0.01, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    moments = {value: (torch.zeros_like(value), torch.zeros_like(value)) for value in twin.parameters()}
    x = drawn(16, 6).float()
    for step in range(1, 6):
        for each in (model, twin):
            each.zero_grad()
            (each(x) - 1).square().mean().backward()
        ours.step()
        muon.step()
        with torch.no_grad():
            for value in twin.parameters():
                first, second = moments[value]
                first.lerp_(value.grad, 0.1)
                second.lerp_(value.grad.square(), 0.01)
                if value.ndim == 1:
                    nesterov = (0.9 * first + 0.1 * value.grad) / (1 - 0.9 ** (step + 1))
                    value.sub_(0.01 * nesterov / ((second / (1 - 0.99**step)).sqrt() + 1e-8))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        # Muon rounds to bfloat16.
        assert float((one - other).detach().norm() / other.detach().norm()) < 5e-3


@pytest.mark.parametrize("told", [True, False])
def test_embeddings_step_by_coordinates(told: bool) -> None:
    """A model says what its tables are, however small or large; without one their shape and size do."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.mul_(0.01 if told else 1.0)
        model[1].weight.mul_(10.0)
    optimizer = GaugedOptimizer(model, symmetries=[]) if told else GaugedOptimizer(model.parameters())
    model(torch.arange(9)).square().mean().backward()
    optimizer.step()
    assert "squares" in optimizer.state[model[0].weight]
    assert "squares" not in optimizer.state[model[1].weight]


@pytest.mark.parametrize("rule", DIRECTIONS)
def test_what_a_step_left_out_is_counted_and_leaves_no_trace(rule: Any) -> None:
    model = Adapter()
    optimizer = GaugedOptimizer(model, rule)
    model(drawn(4, 9)).square().mean().backward()
    optimizer.step()
    before = [value.detach().clone() for value in (*model.parameters(), *optimizer.state[model.lora_B].values())]
    model.head.grad[0, 0] = math.inf
    optimizer.step()
    after = [*model.parameters(), *optimizer.state[model.lora_B].values()]
    assert optimizer.skipped == 1
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("sizes", [(16, 32, 33), (64, 130, 131), (8, 8, 2)], ids=str)
def test_adam_in_a_gauge_of_wide_pairs_stays_finite_in_single_precision(sizes: tuple[int, int, int]) -> None:
    entering, size, leaving = sizes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(entering, size), nn.Linear(size, leaving))
    optimizer = GaugedOptimizer(model, "adam", lr=0.02)
    for _ in range(10):
        target = torch.randint(leaving, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, entering)), target).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    assert all(bool(value.isfinite().all()) for value in model.parameters())


def test_a_step_that_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Adapter()
    optimizer = GaugedOptimizer(model)
    before = [value.detach().clone() for value in model.parameters()]
    plain = optimizer._as_they_are
    monkeypatch.setattr(
        optimizer, "_as_they_are", lambda *given: {name: value * math.nan for name, value in plain(*given).items()}
    )
    model(drawn(4, 9)).square().mean().backward()
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: GaugedOptimizer(model, "newton"), "rule is one of polar, shampoo, adam, descent"),
        (lambda model: GaugedOptimizer(model, gauge="none"), "gauge is one of whitening, random, identity"),
        (lambda model: GaugedOptimizer(model, lr=-1), "lr is the size of the steps"),
        (lambda model: GaugedOptimizer(model, betas=(0.9, 1.0)), "betas are the memories"),
        (lambda model: GaugedOptimizer(model, total_steps=0), "total_steps is the number"),
        (lambda model: GaugedOptimizer(model.parameters(), example_input=drawn(1, 9)), "give the model itself"),
        (lambda model: GaugedOptimizer(nn.Linear(2, 2), symmetries=adapter_pairs(model)), "does not have"),
        (
            lambda model: GaugedOptimizer(model).load_state_dict(torch.optim.SGD(model.parameters()).state_dict()),
            "not a GaugedOptimizer's",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[nn.Module], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(Adapter())


def test_it_says_where_it_knows_no_factors() -> None:
    with pytest.warns(UserWarning, match="knows no factors"):
        GaugedOptimizer(Attention())


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.q, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.table(x).mT).mT
        return self.head((torch.relu(self.q(h)) * self.v(h)).mean(1))


PEFT: dict[str, tuple[dict[str, Any], int]] = {
    "q and v": ({"target_modules": ["q", "v"]}, 2),
    "rank pattern": ({"target_modules": ["q", "v"], "rank_pattern": {"v": 4}}, 2),
    "dropout": ({"target_modules": ["q", "v"], "lora_dropout": 0.3}, 2),
    "DoRA": ({"target_modules": ["q", "v"], "use_dora": True}, 2),
    "embedding and convolution": ({"target_modules": ["table", "conv", "q"]}, 3),
    "modules to save": ({"target_modules": ["q"], "modules_to_save": ["head"]}, 1),
    "bf16 base": ({"target_modules": ["q", "v"]}, 2),
}


@pytest.mark.parametrize("case", PEFT)
def test_peft_as_people_use_it(case: str) -> None:
    import peft

    torch.manual_seed(0)
    settings, count = PEFT[case]
    base = _Base().bfloat16() if case == "bf16 base" else _Base()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, **settings))
    optimizer = GaugedOptimizer(model, lr=0.02)
    assert len(optimizer.pairs) == count
    x, y = torch.randint(12, (32, 5), generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.02, losses
    for name, value in model.named_parameters():
        assert not value.requires_grad or value in optimizer.state, name


def test_several_adapters_and_disabled_ones() -> None:
    import peft

    torch.manual_seed(0)
    model: Any = peft.get_peft_model(_Base(), peft.LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q", "v"]))
    model.set_adapter("other")
    optimizer = GaugedOptimizer(model, lr=0.02)
    assert len(optimizer.pairs) == 3
    x = torch.randint(12, (8, 5))
    model(x).square().mean().backward()
    with model.disable_adapter():
        model(x)
    optimizer.step()
    layer = model.base_model.model.q
    assert bool(layer.lora_B["other"].weight.any())
    assert not bool(layer.lora_B["default"].weight.any())


def test_adapters_with_something_between_their_factors_are_left_out() -> None:
    layer = nn.Linear(5, 3)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.zeros(3, 2))
    assert len(adapter_pairs(layer)) == 1
    layer.lora_E = nn.Parameter(torch.ones(2, 1))
    assert not adapter_pairs(layer)
    shared = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    shared[0].lora_A = shared[1].lora_A = nn.Parameter(torch.ones(2, 5))
    for each in shared:
        each.lora_B = nn.Parameter(torch.zeros(3, 2))
    assert not adapter_pairs(shared)


def test_named_factors_are_stepped_in_gauges() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(drawn(2, 5)), "b": nn.Parameter(drawn(3, 2))})
    optimizer = GaugedOptimizer(model, symmetries=[LoRAPair.of(model, "a", "b")])
    (model["b"] @ model["a"]).square().sum().backward()
    optimizer.step()
    assert len(optimizer.pairs) == 1
