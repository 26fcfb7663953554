"""Naming the symmetries of plain chains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import metateleport as mt


def names(model: nn.Module) -> list[tuple[str, str, str]]:
    return [(type(s).__name__, s.first, s.second) for s in mt.symmetries_of(model)]  # type: ignore[attr-defined]


def test_linear_pairs_and_rescalings_in_the_order_of_the_data_flow() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 2)
    )
    assert names(model) == [("LinearPair", "0", "1"), ("Rescaling", "1", "4"), ("LinearPair", "4", "6")]


def test_other_activations_break_the_chain() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "2", "4")]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "2", "4")]


def test_what_acts_on_single_units_leaves_the_diagonal_only() -> None:
    for between in (nn.Dropout(0.5), nn.ReLU(), nn.PReLU()):
        assert names(nn.Sequential(nn.Linear(3, 4), between, nn.Linear(4, 2))) == [("Rescaling", "0", "2")]


def test_nested_chains_convolutions_and_flattening() -> None:
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.LeakyReLU(0.1))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    assert names(model) == [("Rescaling", "0.0", "0.3"), ("Rescaling", "0.3", "2"), ("Rescaling", "2", "4")]
    report = mt.teleport(model, mt.RandomTeleporter(seed=0), torch.randn(4, 1, 8, 8).double())
    assert report.accepted
    assert report.drift <= 1e-12


def test_pairs_that_cannot_move_are_left_out() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(mt.Unsuitable, match="no two layers"):
        mt.symmetries_of(model)
    frozen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    frozen[0].requires_grad_(False)
    assert names(frozen) == [("Rescaling", "2", "4")]


def test_a_flattened_sequence_is_not_taken_for_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "3", "5")]


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Sequential()],
)
def test_a_chain_without_symmetries_is_refused(model: nn.Module) -> None:
    with pytest.raises(mt.Unsuitable, match="no two layers"):
        mt.symmetries_of(model)


def test_any_other_module_is_told_how_to_name_its_symmetries() -> None:
    with pytest.raises(mt.Unsuitable, match=r"nn.Sequential.*this is a Transformer.*symmetries=\["):
        mt.symmetries_of(nn.TransformerEncoderLayer(4, 2))
