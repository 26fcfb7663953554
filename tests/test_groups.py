"""Group laws as properties of random elements, for every group, batched and not."""

from __future__ import annotations

import pytest
import torch

from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal, random_source, still

GROUPS = [GeneralLinear(4), Orthogonal(4), PositiveDiagonal(4), GeneralLinear(1), Orthogonal(1)]
BATCHES = [(), (3,), (2, 3)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}

each_group = pytest.mark.parametrize("group", GROUPS, ids=repr)
each_batch = pytest.mark.parametrize("batch", BATCHES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def full(group: Group, element: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(element) if isinstance(group, PositiveDiagonal) else element


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = TOLERANCE[a.dtype]
    return a.dtype == b.dtype and torch.allclose(a, b.expand_as(a), rtol=tolerance, atol=tolerance)


@each_group
@each_batch
@each_dtype
def test_group_laws(group: Group, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    t = group.random_generator(*batch, size=0.7, seed=1, dtype=dtype)
    a, b, c = group.exp(t), group.random(*batch, seed=2, dtype=dtype), group.random(*batch, seed=3, dtype=dtype)
    one = group.identity(*batch, dtype=dtype)
    assert a.shape == one.shape == (*batch, *group.shape)
    assert close(group.exp(torch.zeros_like(t)), one)
    assert close(group.compose(a, group.exp(-t)), one)
    assert close(group.compose(a, group.inverse(a)), one)
    assert close(group.compose(group.inverse(a), a), one)
    assert close(group.compose(one, a), a)
    assert close(group.compose(group.compose(a, b), c), group.compose(a, group.compose(b, c)))
    assert close(group.exp(2 * t), group.compose(a, a))
    assert close(full(group, group.compose(a, b)), full(group, a) @ full(group, b))


@each_group
@each_batch
def test_elements_lie_in_their_group(group: Group, batch: tuple[int, ...]) -> None:
    generator = group.random_generator(*batch, size=1.5, seed=4, dtype=torch.float64)
    matrix = full(group, group.exp(generator))
    # det exp T = exp tr T, which is positive: the identity component.
    trace = full(group, generator).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert close(torch.linalg.det(matrix), trace.exp())
    if isinstance(group, Orthogonal):
        assert close(matrix @ matrix.mT, group.identity(dtype=torch.float64))
    if isinstance(group, PositiveDiagonal):
        assert bool((group.exp(generator) > 0).all())


@each_group
@each_batch
def test_projection_is_the_nearest_generator(group: Group, batch: tuple[int, ...]) -> None:
    matrix = torch.randn(*batch, group.size, group.size, dtype=torch.float64)
    projected = full(group, group.project(matrix))
    assert close(full(group, group.project(projected)), projected)
    other = full(group, group.random_generator(*batch, seed=5, dtype=torch.float64))
    assert torch.allclose(
        ((matrix - projected) * other).sum((-2, -1)), torch.zeros(batch, dtype=torch.float64), atol=1e-12
    )


def test_dimension_counts_independent_generators() -> None:
    for group in GROUPS:
        units = torch.eye(group.size**2, dtype=torch.float64).unflatten(-1, (group.size, group.size))
        rank = torch.linalg.matrix_rank(full(group, group.project(units)).flatten(1))
        assert int(rank) == group.dimension


def test_rotations_project_what_they_exponentiate() -> None:
    group = Orthogonal(3)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    assert torch.equal(group.exp(matrix), group.exp(group.project(matrix)))
    antisymmetric = group.project(matrix)
    assert torch.allclose(group.exp(antisymmetric), torch.linalg.matrix_exp(antisymmetric), atol=1e-14)


@each_group
@each_batch
@each_dtype
@pytest.mark.parametrize("size", [0.0, 1e-8, 0.3, 40.0])
def test_random_generators_have_the_size_asked(
    group: Group, batch: tuple[int, ...], dtype: torch.dtype, size: float
) -> None:
    drawn = group.random_generator(*batch, size=size, seed=6, dtype=dtype)
    expected = size if group.dimension else 0.0
    assert drawn.dtype == dtype
    assert torch.allclose(group.norm(drawn), torch.full(batch, expected, dtype=dtype), rtol=1e-6, atol=0)
    assert close(full(group, group.project(full(group, drawn))), full(group, drawn))


def test_directions_are_uniform() -> None:
    group = PositiveDiagonal(3)
    drawn = group.random_generator(20000, seed=0, dtype=torch.float64)
    assert float(drawn.mean(0).abs().max()) < 0.02
    assert torch.allclose(drawn.mT @ drawn / 20000, torch.eye(3, dtype=torch.float64) / 3, atol=0.01)


@each_group
def test_seeds_and_generators_reproduce(group: Group) -> None:
    first, again = group.random_generator(2, seed=7), group.random_generator(2, seed=7)
    assert torch.equal(first, again)
    source = torch.Generator().manual_seed(7)
    assert torch.equal(group.random_generator(2, generator=source), first)
    # A seed means the same in every dtype.
    assert torch.allclose(group.random_generator(2, seed=7, dtype=torch.float64).float(), first)
    if group.dimension > 1:
        assert not torch.equal(group.random_generator(2, generator=source), first)
    before = torch.get_rng_state()
    group.random(seed=8)
    assert torch.equal(torch.get_rng_state(), before)


@each_group
def test_exponential_and_inverse_have_right_derivatives(group: Group) -> None:
    generator = group.random_generator(2, size=0.8, seed=9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(group.exp, generator)
    assert torch.autograd.gradcheck(lambda t: group.inverse(group.exp(t)), generator)
    assert torch.autograd.gradgradcheck(group.exp, generator)


@pytest.mark.parametrize("size", [0.3, 0.6, 0.99, 1.5])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_step_is_the_exponential_where_it_is_not_short(size: float, shape: tuple[int, ...]) -> None:
    group = GeneralLinear(6)
    element, step = (group.random_generator(*shape, size=size, seed=seed, dtype=torch.float64) for seed in (1, 2))
    # In one direction alone the powers of a generator are largest.
    straight = size * torch.diag(torch.eye(6, dtype=torch.float64)[0]).expand_as(step)
    for each in (step, straight):
        found, exact = group.retract(element, each), group.exp(each) @ element
        error = float((found - exact).abs().max() / exact.abs().max())
        assert error < 1e-15 if size > 0.5 else 1e-3 < error < size**2


@each_group
@each_batch
def test_condition_numbers(group: Group, batch: tuple[int, ...]) -> None:
    element = group.random(*batch, size=2.0, seed=10, dtype=torch.float64)
    found = group.condition(element)
    assert found.shape == batch
    assert torch.allclose(found, torch.linalg.cond(full(group, element)), rtol=1e-9)
    assert torch.allclose(group.condition(group.identity(*batch)), torch.ones(batch))


@pytest.mark.parametrize("group", [GeneralLinear(2), PositiveDiagonal(2)], ids=repr)
def test_condition_is_infinite_where_an_element_is_lost_and_only_there(group: Group) -> None:
    good = group.identity()
    bad = [torch.full_like(good, value) for value in (float("nan"), float("inf"), 0.0)]
    found = group.condition(torch.stack([*bad, good.clone()]))
    assert found[:3].isinf().all()
    assert found[3] == 1
    assert group.conditioned(torch.stack([*bad, good.clone()]), 1e30).tolist() == [False, False, False, True]


@each_group
def test_a_bound_on_the_condition_number_decides_as_the_number_does(group: Group) -> None:
    """With bounds right below and above the number, far from it, and beyond what the dtype resolves."""
    for size in (0.1, 2.0, 20.0):
        element = group.random(4, size=size, seed=11, dtype=torch.float64)
        number = group.condition(element)
        assert group.conditioned(element, float("inf")).all()
        for one in range(4):
            for factor in (0.5, 1 - 1e-6, 1 + 1e-6, 2.0, 1e3, 1e9):
                bound = float(number[one]) * factor
                assert torch.equal(group.conditioned(element, bound), number <= bound)


def test_equality_is_of_kind_and_size() -> None:
    assert GeneralLinear(3) == GeneralLinear(3)
    assert hash(GeneralLinear(3)) == hash(GeneralLinear(3))
    assert GeneralLinear(3) != GeneralLinear(4)
    assert GeneralLinear(3) != Orthogonal(3)


@pytest.mark.parametrize("size", [0, -1, 1.5, "3"])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        GeneralLinear(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [-1.0, float("inf"), float("nan")])
def test_a_norm_that_is_none_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="Frobenius norm"):
        GeneralLinear(2).random_generator(size=size)


def test_a_seed_and_a_generator_are_refused_together() -> None:
    with pytest.raises(ValueError, match="not both"):
        GeneralLinear(2).random_generator(seed=0, generator=torch.Generator())
    assert random_source(None, None) is None


def test_an_element_keeps_the_inverse_that_it_came_with() -> None:
    group = GeneralLinear(3)
    generator = group.random_generator(2, seed=0, dtype=torch.float64).requires_grad_()
    element = group.exp(generator)
    inverse = group.inverse(element)
    assert inverse is group.inverse(element)
    assert inverse.requires_grad
    assert torch.allclose(inverse, torch.linalg.inv(element))
    detached = still(element)
    assert not detached.requires_grad
    assert not group.inverse(detached).requires_grad
    assert torch.equal(group.inverse(detached), inverse)
    # Another tensor has another inverse.
    assert torch.allclose(group.inverse(2 * element), inverse / 2)
