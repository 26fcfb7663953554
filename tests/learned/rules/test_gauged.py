"""The learned update of factors in gauges: what it is at its start, and what no split of a product changes."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import Task, TaskStack
from metateleport.gauges.spectrum import product_gauges
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.meta_optimizer import InnerLoop
from metateleport.learned.parts import TeleportSettings
from metateleport.learned.rules.gauged import GaugedSettings
from metateleport.settings import SettingsError
from metateleport.symmetries import AttentionVO, LoRAPair
from metateleport.training.unroll import Unroll


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def element(size: int, seed: int, condition: float, scale: float) -> Tensor:
    left, right = (torch.linalg.qr(drawn(size, size, seed=seed + shift))[0] for shift in (11, 12))
    values = torch.logspace(-math.log10(condition) / 2, math.log10(condition) / 2, size, dtype=torch.float64)
    return scale * left @ torch.diag(values) @ right


class Adapted(nn.Module):
    """Two frozen layers with adapters of two ranks, and a head that is trained whole."""

    def __init__(self, seed: int = 0, scale: float = 1.0, condition: float = 1.0, zero: bool = True) -> None:
        super().__init__()
        self.bases = nn.ParameterList(
            nn.Parameter(drawn(8, 8, seed=place) / 3, requires_grad=False) for place in (1, 2)
        )
        self.downs, self.ups = nn.ParameterList(), nn.ParameterList()
        for place, rank in enumerate((2, 3)):
            g = element(rank, seed, condition, scale)
            down, up = drawn(rank, 8, seed=seed + 20 + place) / 3, drawn(8, rank, seed=seed + 30) * (not zero)
            self.downs.append(nn.Parameter(g @ down))
            self.ups.append(nn.Parameter(up @ torch.linalg.inv(g)))
        self.head = nn.Linear(8, 2, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(drawn(2, 8, seed=4) / 3)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for base, down, up in zip(self.bases, self.downs, self.ups, strict=True):
            x = torch.tanh(x @ (base + up @ down).T)
        return self.head(x)

    def pairs(self) -> list[LoRAPair]:
        return [LoRAPair.of(self, f"downs.{place}", f"ups.{place}") for place in (0, 1)]


def task(seed: int = 0, **settings: Any) -> Task:
    model = Adapted(seed, **settings)
    x, y = drawn(32, 8, seed=seed + 50), drawn(32, 2, seed=seed + 60)
    return Task(model, nn.functional.mse_loss, (x,), (y,), symmetries=model.pairs(), seed=seed, batch_size=8)


def meta(seed: int = 0) -> MetaOptimizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MetaOptimizer(MetaOptimizerConfig(GaugedSettings(hidden=4, plain_hidden=4), teleport=None))
        for network in made.rule.networks.values():  # type: ignore[union-attr]
            # So that the outputs depend on what is seen.
            nn.init.normal_(network.head.weight, std=0.5)
    return made.double()


def run(stack: TaskStack, networks: MetaOptimizer, steps: int = 30, total: int | None = 30) -> dict[str, Tensor]:
    loop = InnerLoop(networks, stack.symmetries, stack.deterministic, total=total)
    weights = {name: value.detach().clone() for name, value in stack.tensors().items()}
    with torch.no_grad():
        for step in range(steps):
            weights = loop.advance(stack.point_at(weights, stack.batch(step))).parameters
    return weights


@pytest.mark.parametrize("zero", [True, False])
def test_the_split_of_an_adapter_makes_no_difference(zero: bool) -> None:
    networks, starts = meta(), TaskStack([task(zero=zero), task(1, zero=zero)])
    others = TaskStack([task(zero=zero, scale=30.0), task(1, zero=zero, scale=0.1, condition=100.0)])
    one, other = run(starts, networks), run(others, networks)
    for place in (0, 1):
        want, got = (each[f"ups.{place}"] @ each[f"downs.{place}"] for each in (one, other))
        assert float(want.norm()) > 0.05
        assert float((want - got).norm() / want.norm()) < 1e-6


def test_it_learns_before_it_was_trained() -> None:
    networks, stack = meta(), TaskStack([task(), task(1)])
    for network in networks.rule.networks.values():  # type: ignore[union-attr]
        nn.init.zeros_(network.head.weight)
    before = stack.losses_at(stack.tensors(), stack.full)
    after = stack.losses_at(run(stack, networks), stack.full)
    assert bool((after < 0.8 * before).all())


def test_the_meta_gradient_is_that_of_finite_differences() -> None:
    networks, stack = meta(), TaskStack([task(zero=False)])
    stack.tasks[0].model.head.requires_grad_(False)
    stack = TaskStack([stack.tasks[0]])
    networks.detach = False

    def value() -> Tensor:
        return Unroll(copy.deepcopy(stack), networks, total=6).window(4)[-1].sum()

    bias = networks.rule.networks["in"].head.bias  # type: ignore[union-attr, index]
    (slope,) = torch.autograd.grad(value(), bias)
    for place in (0, 4):
        found = []
        for sign in (1, -1):
            bias.data[place] += sign * 1e-4
            found.append(float(value().detach()))
            bias.data[place] -= sign * 1e-4
        difference = (found[0] - found[1]) / 2e-4
        # Gauges and features are kept out of the graph.
        assert abs(difference - float(slope[place])) < 0.3 * max(abs(difference), 1e-3), place


def test_steps_are_shorter_near_the_end_of_a_run_that_is_told() -> None:
    networks, stack = meta(), TaskStack([task()])
    for network in networks.rule.networks.values():  # type: ignore[union-attr]
        nn.init.zeros_(network.head.weight)
    weights = {}
    for total in (None, 31):
        loop = InnerLoop(networks, stack.symmetries, False, total=total)
        weights[total] = {name: value.detach().clone() for name, value in stack.tensors().items()}
        for step in range(30):
            point = stack.point_at(weights[total], stack.batch(step))
            last, weights[total] = weights[total], loop.advance(point).parameters
        weights[total] = {name: (weights[total][name] - last[name]).norm() for name in ("ups.0", "downs.1")}
    for name in ("ups.0", "downs.1"):
        assert float(weights[31][name]) < 0.2 * float(weights[None][name])


def test_heads_share_a_state_and_the_rest_of_their_tensors_is_stepped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).double()
    model.v, model.o = model[0], model[1]
    plain = nn.ModuleDict({"v": nn.Linear(6, 8), "o": nn.Linear(8, 6)}).double()
    pairs = AttentionVO.of_heads(plain, "v", "o", heads=2)
    optimizer = mt.LearnedOptimizer(plain, meta(), symmetries=pairs)
    x = drawn(16, 6)
    losses = []
    for _ in range(20):
        loss = (plain["o"](plain["v"](x)) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert optimizer.state[plain["v"].weight]["columns"].shape == (1, 2, 4, 4)


def test_learned_optimizer_finds_adapters_and_goes_on_from_a_state_dict() -> None:
    def adapter() -> nn.Module:
        layer = nn.Linear(8, 6).double()
        with torch.no_grad():
            layer.weight.copy_(drawn(6, 8))
            layer.bias.zero_()
        layer.requires_grad_(False)
        layer.lora_A, layer.lora_B = nn.Parameter(drawn(2, 8, seed=1)), nn.Parameter(drawn(6, 2, seed=2) * 0)
        layer.forward = lambda x: nn.functional.linear(x, layer.weight + layer.lora_B @ layer.lora_A)  # type: ignore[method-assign]
        return layer

    networks, x, y = meta(), drawn(16, 8), drawn(16, 6, seed=3)

    def go(model: nn.Module, optimizer: mt.LearnedOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = adapter()
        whole = mt.LearnedOptimizer(first, networks, total_steps=20)
    assert len(whole.symmetries) == 1
    assert whole._recorder is None
    go(first, whole, 12)
    second = adapter()
    half = mt.LearnedOptimizer(second, networks, total_steps=20)
    go(second, half, 6)
    third = adapter()
    third.load_state_dict(second.state_dict())
    rest = mt.LearnedOptimizer(third, networks, total_steps=20)
    rest.load_state_dict(copy.deepcopy(half.state_dict()))
    go(third, rest, 6)
    assert torch.allclose(third.lora_B, first.lora_B, atol=1e-12)
    go(first, whole, 10)
    still = first.lora_B.detach().clone()
    go(first, whole, 2)
    assert torch.equal(first.lora_B, still)


def test_a_frozen_factor_still_makes_the_gauge_of_the_other() -> None:
    outputs = []
    for scale in (1.0, 30.0):
        model = Adapted(scale=scale, zero=False)
        model.downs.requires_grad_(False)
        optimizer = mt.LearnedOptimizer(model, meta(), symmetries=model.pairs())
        x = drawn(16, 8)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        outputs.append(model(x).detach())
    assert float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < 1e-6


def test_no_teleport_goes_with_it() -> None:
    with pytest.raises(SettingsError, match="leave the teleport out"):
        MetaOptimizerConfig(GaugedSettings(), TeleportSettings())


def test_the_reach_leads_from_ones_own_white_to_the_others() -> None:
    out, into = drawn(1, 9, 3), drawn(1, 7, 3, seed=1)
    gauges = product_gauges(out.mT @ out, into.mT @ into, torch.full((1,), 1e-6).double())
    one, none = torch.ones(1).double(), torch.zeros(1).double()
    for side, own, other in (("in", into, out), ("out", out, into)):
        white = gauges.reaching(side, one)  # type: ignore[arg-type]
        assert torch.allclose((white @ white.mT) @ (other.mT @ other), torch.eye(3).double().unsqueeze(0), atol=1e-6)
        # What is white of a side itself moves by the transposed inverse.
        start = gauges.reaching(side, none)  # type: ignore[arg-type]
        seen = torch.linalg.inv(start) @ (own.mT @ own) @ torch.linalg.inv(start).mT
        assert torch.allclose(seen, seen[0, 0, 0] * torch.eye(3).double(), atol=1e-6 * float(seen.norm()))


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_without_the_gauge_the_split_does_make_a_difference(kind: Any) -> None:
    networks = meta()
    networks.rule.kind = kind  # type: ignore[union-attr]
    one, other = (run(TaskStack([task(scale=scale)]), networks) for scale in (1.0, 30.0))
    want, got = (each["ups.0"] @ each["downs.0"] for each in (one, other))
    apart = float((want - got).norm() / want.norm())
    # Scales are the same in every direction, and conditions are not.
    assert apart > 0.1 if kind == "identity" else apart < 1e-6
    other = run(TaskStack([task(condition=100.0)]), networks)
    assert float((other["ups.0"] @ other["downs.0"] - want).norm() / want.norm()) > 0.1


@pytest.mark.parametrize(
    ("entering", "size", "leaving"), [(64, 8, 3), (8, 12, 24), (16, 32, 3), (16, 4, 8), (16, 4, 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_low_rank_and_ranks_above_the_layers_do_no_harm(
    entering: int, size: int, leaving: int, dtype: torch.dtype
) -> None:
    """What momenta lack is made of rounding alone; nothing may be made of it."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, entering, generator=source).to(dtype)
    model = nn.Sequential(nn.Linear(entering, size), nn.Linear(size, leaving)).to(dtype)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=source) / 4)
        model[1].weight.zero_()
    optimizer = mt.LearnedOptimizer(model, "lora", total_steps=40)
    losses = []
    for _ in range(40):
        # One direction of the output alone has a gradient.
        loss = (model(x)[:, :1] - x[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert optimizer.skipped == 0
    assert max(losses) < 2 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("size", "seed"), [(8, 1), (16, 1), (16, 3)])
def test_square_factors_in_front_of_few_outputs_take_every_step(size: int, seed: int) -> None:
    """Their gauge comes to a condition number at which rounding leaves Gram matrices with eigenvalues below zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, 2, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(0, size**-0.5)
        model[1].weight.zero_()
    x, y = torch.randn(64, size), torch.randn(64, 2)
    optimizer = mt.LearnedOptimizer(model, "lora")
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert optimizer.skipped == 0
    assert max(losses) < 1.01 * losses[0]
    assert losses[-1] < 0.95 * losses[0]
