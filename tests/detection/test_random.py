"""Random architectures: what their construction says is found, and holds as a group."""

from __future__ import annotations

import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor, nn

import metateleport as mt
from metateleport.detection.draws import random_element
from metateleport.point import Point


@dataclasses.dataclass(frozen=True)
class Plan:
    """A chain of layers of some widths, with what stands between them, and a seed."""

    widths: tuple[int, ...]
    between: tuple[str, ...]
    skips: tuple[bool, ...]
    bias: bool
    seed: int


UNITS = {
    "nothing": nn.Identity,
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "prelu": nn.PReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu6": nn.ReLU6,
}


class Chain(nn.Module):
    """Layers with units between; a skip adds what went into a layer of equal widths, before the unit."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        pairs = list(zip(plan.widths, plan.widths[1:], strict=False))
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=plan.bias) for a, b in pairs)
        self.units = nn.ModuleList(UNITS[name]() for name in plan.between)
        self.skips = plan.skips

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            h = layer(x)
            if self.skips[index] and h.shape == x.shape:
                h = h + x
            x = self.units[index](h) if index < len(self.units) else h
        return x


@strategies.composite
def plans(draw: strategies.DrawFn) -> Plan:
    depth = draw(strategies.integers(2, 5))
    widths = tuple(draw(strategies.lists(strategies.integers(1, 4), min_size=depth + 1, max_size=depth + 1)))
    between = tuple(
        draw(strategies.lists(strategies.sampled_from(sorted(UNITS)), min_size=depth - 1, max_size=depth - 1))
    )
    skips = tuple(draw(strategies.lists(strategies.booleans(), min_size=depth, max_size=depth)))
    return Plan(widths, between, skips, draw(strategies.booleans()), draw(strategies.integers(0, 99)))


def expected_dimension(plan: Plan) -> int:
    """Of rescalings and linear pairs: hidden widths that one skip-connected stream shares count once."""
    streams: list[tuple[int, bool, bool]] = []
    # Of each value that flows: its width, whether it may scale at all, whether all units so far were linear.
    width, free, linear = plan.widths[0], False, True
    for index in range(len(plan.widths) - 1):
        out = plan.widths[index + 1]
        if plan.skips[index] and out == width:
            carried = free
        else:
            if free:
                streams.append((width, free, linear))
            carried, linear = True, True
        width, free = out, carried
        if index < len(plan.between):
            unit = plan.between[index]
            if unit in ("tanh", "gelu", "relu6"):
                free = False
            linear = linear and unit == "nothing"
    return sum(width * width if linear else width for width, _, linear in streams)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(plans())
@pytest.mark.slow(seconds=3)
def test_random_chains(plan: Plan) -> None:
    torch.manual_seed(plan.seed)
    model = Chain(plan).double()
    with torch.no_grad():
        inputs = torch.randn(7, plan.widths[0], dtype=torch.float64)
    found = mt.find_symmetries(model, inputs)
    exact = [each for each in found.exact if each.kind != "translation"]
    assert sum(each.dimension for each in exact) == expected_dimension(plan), (plan, str(found))
    _holds(model, found.exact, torch.randn(9, plan.widths[0], dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class Block:
    """A convolution, full or depthwise, and what stands behind it."""

    channels: int
    depthwise: bool
    norm: str
    unit: str
    pool: str


NORMS = {"none": lambda _: nn.Identity(), "batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(1, channels)}
POOLS = {"none": nn.Identity, "average": lambda: nn.AvgPool2d(2, 1), "largest": lambda: nn.MaxPool2d(2, 1)}
HOMOGENEOUS = ("nothing", "relu", "leaky", "prelu")


@strategies.composite
def blocks(draw: strategies.DrawFn) -> tuple[Block, ...]:
    found: list[Block] = []
    for _ in range(draw(strategies.integers(1, 3))):
        depthwise = bool(found) and draw(strategies.booleans())
        channels = found[-1].channels if depthwise else draw(strategies.integers(1, 4))
        choices = (draw(strategies.sampled_from(sorted(kinds))) for kinds in (NORMS, UNITS, POOLS))
        found.append(Block(channels, depthwise, *choices))
    return tuple(found)


def convolutional(plan: tuple[Block, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    channels, size = 2, 7
    for block in plan:
        groups = channels if block.depthwise else 1
        layers.append(nn.Conv2d(channels, block.channels, 3, padding=1, groups=groups))
        layers += [NORMS[block.norm](block.channels), UNITS[block.unit](), POOLS[block.pool]()]
        channels, size = block.channels, size - (block.pool != "none")
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, 2))
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return model.double().eval()


def dimension_of(plan: tuple[Block, ...]) -> int:
    """Of all but translations: before each BatchNorm, and behind each block up to what takes it in."""
    total = 0
    for index, block in enumerate(plan):
        total += block.channels * (block.norm == "batch")
        # A convolution of one channel is depthwise and full at once.
        mixes = index + 1 == len(plan) or not plan[index + 1].depthwise or block.channels == 1
        # Nor can what a depthwise convolution puts out be mixed by its own weights.
        mixes = mixes and (not block.depthwise or block.channels == 1)
        if block.unit in HOMOGENEOUS:
            linear = block.norm == "none" and block.unit == "nothing" and block.pool != "largest" and mixes
            total += block.channels ** (2 if linear else 1)
    return total


@hypothesis.settings(max_examples=16, deadline=None, derandomize=True, database=None)
@hypothesis.given(blocks())
@pytest.mark.slow(seconds=3)
def test_random_convolutions(plan: tuple[Block, ...]) -> None:
    torch.manual_seed(len(plan))
    model = convolutional(plan)
    found = mt.find_symmetries(model, torch.randn(3, 2, 7, 7, dtype=torch.float64)).exact
    assert sum(each.dimension for each in found if each.kind != "translation") == dimension_of(plan), (plan, str(found))
    _holds(model, found, torch.randn(2, 2, 7, 7, dtype=torch.float64))


def _holds(model: nn.Module, found: mt.Symmetries, inputs: Tensor) -> None:
    start = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    expected = model(inputs).detach()
    source = torch.Generator().manual_seed(0)
    for symmetry in found:
        left, right = (random_element(symmetry.group, 1.0, source, torch.float64) for _ in range(2))
        once = symmetry.act(symmetry.group.compose(left, right), Point(start)).parameters
        twice = symmetry.act(left, symmetry.act(right, Point(start))).parameters
        back = symmetry.act(symmetry.group.inverse(left), symmetry.act(left, Point(start))).parameters
        for name in (*symmetry.parameters, *symmetry.buffers):
            assert torch.allclose(once[name], twice[name], rtol=1e-9, atol=1e-11)
            assert torch.allclose(back[name], start[name], rtol=1e-9, atol=1e-11)
        outputs = torch.func.functional_call(model, once, (inputs,))
        assert float((outputs - expected).norm()) <= 1e-10 * float(expected.norm())


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["whole", "grouped"])
def test_attention_of_any_shape(heads: int, kind: str) -> None:
    size, groups = 3, heads if kind == "whole" else 1

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(5, (heads + 2 * groups) * size)
            self.out = nn.Linear(heads * size, 5)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).split([heads * size, groups * size, groups * size], -1)
            query, key, value = (part.unflatten(-1, (-1, size)).transpose(-2, -3) for part in parts)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=groups < heads)
            return self.out(mixed.transpose(-2, -3).flatten(-2))

    model = Attention().double()
    inputs = torch.randn(2, 4, 5, dtype=torch.float64)
    found = mt.find_symmetries(model, inputs)
    counts = found.by_kind()
    values = counts.get("attention VO", counts.get("linear chain"))
    assert counts["attention QK"] == values == (groups, groups * size**2)
    _holds(model, found, torch.randn(2, 6, 5, dtype=torch.float64))
