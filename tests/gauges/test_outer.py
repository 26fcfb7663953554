"""Outer gauges: a sketch is the running mean of second moments, and the step in it is Shampoo's."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.gauges.outer import length_ratio, outer_gauge, polar_in_outer, sketch_width, sketched
from metateleport.linalg import polar_factors


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_sketch_as_wide_as_the_rows_is_the_running_mean() -> None:
    sketch, mean, memory = torch.zeros(2, 6, 6).double(), torch.zeros(2, 6, 6).double(), torch.tensor([0.9, 0.5])
    for step in range(10):
        seen = drawn(2, 6, 3, seed=step)
        sketch = sketched(sketch, seen, memory)
        own = memory.double()[:, None, None]
        mean = own * mean + (1 - own) * seen @ seen.mT
    assert torch.allclose(sketch @ sketch.mT, mean)
    inner = sketch.mT @ sketch
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-12)


def test_a_narrow_sketch_has_the_largest_directions() -> None:
    large, small = drawn(1, 40, 3), 1e-3 * drawn(1, 40, 20, seed=1)
    sketch = sketched(torch.zeros(1, 40, 16).double(), torch.cat((large, small), -1), torch.tensor([0.0]))
    assert float((sketch @ sketch.mT - large @ large.mT).norm()) < 1e-3 * float((large @ large.mT).norm())


def test_a_sketch_does_not_depend_on_the_coordinates_of_the_gauge() -> None:
    old, seen, turn = drawn(1, 30, 16, seed=2), drawn(1, 30, 4, seed=3), torch.linalg.qr(drawn(4, 4, seed=4))[0]
    one, other = (sketched(old, each, torch.tensor([0.8])) for each in (seen, seen @ turn))
    assert torch.allclose(one @ one.mT, other @ other.mT)


def test_steps_that_are_left_out_or_not_finite_leave_a_sketch_as_it_is() -> None:
    sketch = drawn(2, 5, 4)
    assert torch.equal(sketched(sketch, drawn(2, 5, 3), torch.ones(2)), sketch)
    broken = drawn(2, 5, 3)
    broken[0, 0, 0] = torch.nan
    after = sketched(sketch, broken, torch.tensor([0.9, 0.9]))
    assert torch.equal(after[0], sketch[0])
    assert not torch.equal(after[1], sketch[1])


def test_the_step_is_the_polar_factor_between_two_fourth_roots() -> None:
    rows, seen = drawn(1, 12, 12, seed=5) @ torch.diag(torch.logspace(-3, 0, 12).double()), drawn(1, 12, 3, seed=6)
    sketch = sketched(torch.zeros_like(rows), rows, torch.tensor([0.0]))
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    root = vectors @ torch.diag_embed((values + 1e-3 * values.max()) ** -0.25) @ vectors.mT
    inside = polar_factors([root @ seen])[0]
    want = root @ inside
    want = want * (inside.norm() / want.norm())
    assert torch.allclose(polar_in_outer(seen, sketch), want, rtol=1e-6, atol=1e-8)
    assert outer_gauge(sketch).values.shape == (1, 12)


def test_nothing_seen_is_no_step() -> None:
    none = torch.zeros(1, 7, 2).double()
    assert torch.equal(polar_in_outer(none, torch.zeros(1, 7, 7).double()), none)


def test_widths() -> None:
    assert [sketch_width(*each) for each in ((1, 100), (16, 100), (64, 100), (4, 3))] == [16, 32, 100, 3]


def test_no_step_is_lengthened_beyond_what_an_outer_gauge_can_shorten() -> None:
    """Where what is left after two of them is rounding, the ratio of the lengths is the largest that there can be."""
    once, made = torch.eye(2).unsqueeze(0), torch.eye(2).unsqueeze(0)
    for left in (1e-12, 0.0, -1e-9):
        ratio = length_ratio(once, left * once, made)
        torch.testing.assert_close(ratio, torch.tensor([1001.0**0.25]))
    torch.testing.assert_close(length_ratio(once, 0.25 * once, made), torch.tensor([2.0]))
