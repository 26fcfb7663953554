"""The exponential and its inverse, from one pair of series: against torch's own, with two derivatives."""

from __future__ import annotations

import pytest
import torch

from metateleport.exponential import exponentials


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.05, 0.3, 1.0, 1.3, 4.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential_and_its_inverse_come_from_one_series(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    generator = torch.randn(3, 6, 6, dtype=torch.float64)
    generator = generator / generator.abs().sum(-1).amax() * size
    found = exponentials(generator.to(dtype))
    for mine, sign in zip(found, (1, -1), strict=True):
        expected = torch.linalg.matrix_exp(sign * generator)
        far = torch.linalg.matrix_norm(mine.double() - expected) / torch.linalg.matrix_norm(expected)
        assert float(far.max()) < (30 if size > 2 else 8) * torch.finfo(dtype).eps
        assert mine.dtype == dtype


@pytest.mark.parametrize("size", [0.1, 0.3, 0.9, 1.4, 3.0])
@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_derivatives_of_the_exponential_and_its_inverse(size: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    generator = torch.randn(*shape, 3, 3, dtype=torch.float64)
    generator = (generator / generator.abs().sum(-1).amax() * size).requires_grad_()
    assert torch.autograd.gradcheck(exponentials, (generator,))
    assert torch.autograd.gradgradcheck(exponentials, (generator,))


@pytest.mark.parametrize("used", [0, 1])
def test_the_derivative_of_one_alone(used: int) -> None:
    torch.manual_seed(2)
    generator = (torch.randn(4, 5, 5, dtype=torch.float64) / 5).requires_grad_()
    weights = torch.randn(4, 5, 5, dtype=torch.float64)
    expected = torch.linalg.matrix_exp((1, -1)[used] * generator)
    pair = (exponentials(generator)[used], expected)
    mine, other = (torch.autograd.grad(each, generator, weights)[0] for each in pair)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_what_is_not_finite_gives_no_element_and_no_error() -> None:
    generator = torch.tensor([[[float("nan"), 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    element, inverse = exponentials(generator)
    assert not bool(element[0].isfinite().all())
    assert torch.allclose(element[1] @ inverse[1], torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_huge_generator_overflows_without_an_error(dtype: torch.dtype) -> None:
    generator = 1e12 * torch.ones(2, 2, dtype=dtype)
    element, _ = exponentials(generator)
    assert not bool(element.isfinite().any())


def test_autocast_does_not_round_it() -> None:
    torch.manual_seed(0)
    generator = torch.randn(6, 6) / 3
    with torch.autocast("cpu", torch.bfloat16):
        inside = exponentials(generator)
    for one, other in zip(inside, exponentials(generator), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
