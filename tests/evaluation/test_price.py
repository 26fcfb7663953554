"""The price of a learned step beside AdamW's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from metateleport.evaluation.price import Unpriced, price_of


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    before = copy.deepcopy(model.state_dict())
    price = price_of(model, torch.randn(8, 4), "digits", rounds=3)
    assert price.ratio == price.learned / price.adamw > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, *, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
        return {"logits": (self.inner(x), [y]), "count": 3}


def test_outputs_and_inputs_of_any_kind() -> None:
    assert price_of(Named(), {"x": torch.ones(4, 3), "y": torch.ones(1)}, "digits", rounds=1).adamw > 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(3, 2).requires_grad_(False), "no parameter of the model is trained"),
        (nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), ""),
    ],
)
def test_what_has_no_price(model: nn.Module, said: str) -> None:
    if not said:
        model.register_forward_hook(lambda _, __, output: output.argmax())
        said = "no tensor with a gradient"
    with pytest.raises(Unpriced, match=said):
        price_of(model, torch.ones(4, 3), "digits", rounds=1)
