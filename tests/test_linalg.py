"""Tensors laid out side by side give what each gives by itself, as do matrices of several sizes in one polar factor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metateleport import linalg
from metateleport.linalg import Blocks, alike, all_finite, polar_factors, squarable

SHAPES = ((3, 4, 5), (3, 7), (3, 2, 2, 3), (3, 1))


def drawn(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_() for shape in shapes]


def scaled(blocks: Blocks, one: list[Tensor], other: list[Tensor]) -> Tensor:
    factors = blocks.spread(blocks.means(one))
    parts = blocks.parts([value * factor for value, factor in zip(other, factors, strict=True)])
    return torch.cat([part.flatten(1) for part in parts], 1)


OPERATIONS: dict[str, Callable[[Blocks, list[Tensor], list[Tensor]], Tensor]] = {
    "mean squares": lambda blocks, one, _: blocks.mean_squares(one),
    "means": lambda blocks, one, _: blocks.means(one),
    "mean products": lambda blocks, one, other: blocks.mean_products(one, other),
    "spread": scaled,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_side_by_side_is_each_by_itself(name: str) -> None:
    found = []
    for free in (True, False):
        one, other = drawn(0), drawn(1)
        blocks = Blocks.of(one, free)
        assert blocks.joined == free
        value = OPERATIONS[name](blocks, blocks.gather(one), blocks.gather(other))
        gradients = torch.autograd.grad((value * torch.linspace(1, 2, value.numel()).view_as(value)).sum(), one)
        found.append((value, *gradients))
    for joined, separate in zip(*found, strict=True):
        assert torch.allclose(joined, separate, rtol=1e-12, atol=1e-14)


def test_large_ones_and_those_of_two_dtypes_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Blocks.of([*drawn(0), torch.zeros(3, 2)], free=True).joined
    monkeypatch.setattr(linalg, "_SMALL", 3 * 40 - 1)
    assert not Blocks.of(drawn(0), free=True).joined
    monkeypatch.setattr(linalg, "_SMALL", 3 * 40)
    assert Blocks.of(drawn(0), free=True).joined


def test_polar_factors_of_several_sizes_are_those_of_each_alone() -> None:
    matrices = drawn(2, ((3, 4, 9), (3, 9, 4), (3, 6, 2, 3), (3, 1, 5), (3, 5, 5)))
    together = polar_factors(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        (alone,) = polar_factors([matrix])
        assert found.shape == matrix.shape
        assert torch.allclose(found, alone, atol=1e-12)
        ours, theirs = (
            torch.autograd.grad(each.square().sum(), matrix, retain_graph=True)[0] for each in (found, alone)
        )
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_only_small_matrices_of_one_kind_share_a_call() -> None:
    wide = torch.zeros(1, 128, 200)
    groups = list(alike({"a": wide, "b": torch.zeros(1, 3, 2), "c": torch.zeros(1, 2, 90), "d": wide}))
    assert groups == [["b", "c"], ["a", "d"]]
    mixed = {"a": torch.zeros(1, 3, 2), "b": torch.zeros(1, 2, 2).double(), "c": torch.zeros(1, 2, 2).double()}
    assert sorted(alike(mixed)) == [["a"], ["b", "c"]]
    spread = {"a": torch.zeros(1, 100, 100), "b": torch.zeros(1, 2, 10**6)}
    assert sorted(alike(spread)) == [["a"], ["b"]]
    # Of eight tasks the work on zeros would be more than a call's.
    several = {"a": torch.zeros(8, 5, 32), "b": torch.zeros(8, 32, 64), "c": torch.zeros(8, 30, 64)}
    assert sorted(alike(several)) == [["a"], ["b", "c"]]
    # One more call serves all square ones, and each of them would be filled up with as many zeros as it has entries.
    halves = {f"{place}": torch.zeros(1, 64, 64 if place < 8 else 128) for place in range(12)}
    assert [len(group) for group in alike(halves)] == [8, 4]
    assert [len(group) for group in alike({name: halves[name] for name in ("0", "8", "9")})] == [3]
    # Each is in one group, however many sizes there are.
    many = {f"{place}": torch.zeros(1, 1 + place % 7, 1 + place) for place in range(200)}
    assert sorted(name for group in alike(many) for name in group) == sorted(many)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_what_is_not_finite_is_found_in_its_task_alone(bad: float) -> None:
    tensors = [value.detach() for value in drawn(3)]
    tensors[1][2, 3] = bad
    assert squarable(tensors).tolist() == [True, True, False]
    assert all_finite(tensors).tolist() == [True, True, bad == 1e200]
    tensors[2][2, 0, 0] = -bad
    assert all_finite(tensors).tolist() == [True, True, bad == 1e200]


@pytest.mark.parametrize("rank", [2, 16, 128])
@pytest.mark.parametrize("halves", [False, True])
def test_long_matrices_have_the_polar_factors_of_the_plain_steps(
    rank: int, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of small batches lack most directions, in which rounding must not grow; bfloat16 as on a GPU."""
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 128, rank, generator=source) @ torch.randn(1, rank, 784, generator=source)
    found: dict[str, Tensor] = {}
    cases = {"exact": (False, math.inf), "plain": (halves, math.inf), "long": (halves, linalg._LONG)}
    for name, (several, long) in cases.items():
        monkeypatch.setattr(linalg, "_LONG", long)
        monkeypatch.setattr(linalg, "multiplies_halves", lambda _, several=several: several)
        found[name] = polar_factors([matrix])[0].flatten()
    along = {name: float(nn.functional.cosine_similarity(each, found["exact"], 0)) for name, each in found.items()}
    assert along["long"] > along["plain"] - (0.02 if halves else 1e-5)
    assert float(torch.linalg.matrix_norm(found["long"].reshape(128, 784), 2)) < 1.3


def test_spread_factors_have_the_derivative_of_a_selection() -> None:
    blocks = Blocks((torch.Size([2, 3]), torch.Size([2, 2, 2])), joined=True)
    factors = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    (spread,) = blocks.spread(factors)
    assert torch.equal(spread[:, :3], factors[0, :, None].expand(2, 3))
    assert torch.equal(spread[:, 3:], factors[1, :, None].expand(2, 4))
    assert torch.autograd.gradcheck(lambda given: blocks.spread(given)[0], (factors,))
    assert torch.autograd.gradgradcheck(lambda given: blocks.spread(given)[0].square(), (factors,))
