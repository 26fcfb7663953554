"""LSTM cells in columns: the steps and derivatives of torch's own cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metateleport.learned.cell import recur_columns


def drawn(dtype: torch.dtype) -> tuple[nn.LSTMCell, list[Tensor]]:
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 5).to(dtype)
    return cell, [torch.randn(7, width, dtype=dtype, requires_grad=True) for width in (3, 5, 5)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("used", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "hidden", "memory"])
def test_two_steps_and_their_derivatives_are_those_of_the_cell(
    used: tuple[float, float], dtype: torch.dtype, tolerance: float
) -> None:
    cell, (inputs, hidden, memory) = drawn(dtype)
    weights = torch.randn(2, 7, 5, dtype=dtype)

    def gradients(state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        parts = [(value * weight).sum() for value, weight, factor in zip(state, weights, used, strict=True) if factor]
        return torch.autograd.grad(sum(parts[1:], parts[0]), [inputs, hidden, memory, *cell.parameters()])

    expected = (hidden, memory)
    columns = (hidden.mT, memory.mT)
    for _ in range(2):
        expected = cell(inputs, expected)
        columns = recur_columns(cell, inputs.mT, columns)
    found = (columns[0].mT, columns[1].mT)
    for mine, theirs in zip((*found, *gradients(found)), (*expected, *gradients(expected)), strict=True):
        assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def test_inputs_that_need_no_derivative_get_none_and_biases_do_not_share_one() -> None:
    cell, (inputs, hidden, memory) = drawn(torch.float64)
    columns = recur_columns(cell, inputs.detach().mT, (hidden.mT, memory.mT))
    columns[0].sum().backward()
    assert inputs.grad is None
    assert cell.bias_ih.grad is not None
    assert torch.equal(cell.bias_ih.grad, cell.bias_hh.grad)  # type: ignore[arg-type]
    assert cell.bias_ih.grad.data_ptr() != cell.bias_hh.grad.data_ptr()  # type: ignore[union-attr]
