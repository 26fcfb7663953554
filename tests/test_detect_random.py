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
def test_random_chains(plan: Plan) -> None:
    torch.manual_seed(plan.seed)
    model = Chain(plan).double()
    with torch.no_grad():
        inputs = torch.randn(7, plan.widths[0], dtype=torch.float64)
    found = mt.find_symmetries(model, inputs)
    exact = [each for each in found.exact if each.kind != "translation"]
    assert sum(each.dimension for each in exact) == expected_dimension(plan), (plan, str(found))
    _holds(model, found.exact, torch.randn(9, plan.widths[0], dtype=torch.float64))


def _holds(model: nn.Module, found: mt.Symmetries, inputs: Tensor) -> None:
    start = {name: value.detach() for name, value in model.named_parameters()}
    expected = model(inputs).detach()
    source = torch.Generator().manual_seed(0)
    for symmetry in found:
        left, right = (random_element(symmetry.group, 1.0, source, torch.float64) for _ in range(2))
        once = symmetry.act(symmetry.group.compose(left, right), mt.Point(start)).parameters
        twice = symmetry.act(left, symmetry.act(right, mt.Point(start))).parameters
        back = symmetry.act(symmetry.group.inverse(left), symmetry.act(left, mt.Point(start))).parameters
        for name in symmetry.parameters:
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
