"""Parameters as a stack of one task, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metateleport.optim.parameters import (
    dense_gradient,
    master,
    raised,
    replicated,
    trainable,
    within,
    working_dtype,
    write,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 4)])
def test_what_is_raised_is_written_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
    before = parameter.detach().clone()
    working = working_dtype({"p": parameter})
    value = raised(parameter.detach(), working)
    assert value.shape[0] == 1
    assert value.ndim >= 2
    assert value.dtype == working
    with torch.no_grad():
        write(parameter, value.clone(), {})
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_spacing_of_half_precision_add_up(dtype: torch.dtype) -> None:
    parameter, state = nn.Parameter(torch.ones(5, dtype=dtype)), {}
    with torch.no_grad():
        for _ in range(1000):
            write(parameter, master(parameter, torch.float32, state) + 1e-4, state)
    assert torch.allclose(parameter.float(), torch.full((5,), 1.1), rtol=1e-2)
    assert state["compensation"].dtype == dtype


def test_a_value_beyond_half_precision_leaves_no_compensation_that_is_not_finite() -> None:
    parameter, state = nn.Parameter(torch.ones(1, dtype=torch.float16)), {}
    with torch.no_grad():
        write(parameter, torch.full((1, 1), 1e6), state)
    assert bool(parameter.isfinite())
    assert bool(state["compensation"].isfinite())


def test_sparse_gradients_are_whole() -> None:
    embedding = nn.Embedding(6, 2, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    assert dense_gradient(embedding.weight)[:, 0].tolist() == [0, 2, 0, 0, 1, 0]


def test_what_cannot_be_stepped() -> None:
    empty, frozen, idle = (nn.Parameter(torch.ones(n)) for n in (0, 2, 2))
    empty.grad, frozen.grad = torch.ones(0), torch.ones(2)
    frozen.requires_grad_(False)
    assert not any(trainable(each) for each in (empty, frozen, idle))


def test_a_step_is_at_most_half_of_what_its_tensor_was_at_first() -> None:
    state: dict[str, torch.Tensor] = {}
    start = torch.full((1, 4), 2.0)
    for _ in range(3):
        goal = within(start, start + 100.0, state)
        assert float((goal - start).norm()) == pytest.approx(2.0)
        start = goal
    assert torch.equal(within(start, start, state), start)
    assert torch.allclose(within(start, start + 0.1, state), start + 0.1)


@pytest.mark.parametrize(("initialised", "ranks", "expected"), [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_replicas_are_several_processes(
    initialised: bool, ranks: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    assert replicated() == expected
