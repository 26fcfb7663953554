"""Whitening: which covariance is white afterwards, and what is not stretched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_cases import case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import point_of
from metateleport.teleporters import travel


def covariances(problem: Any) -> dict[str, Tensor]:
    (symmetry,) = problem.symmetries
    return symmetry.matrices(problem.point())


@pytest.mark.parametrize(
    ("name", "side", "white"),
    [
        ("2022 form, samples at width", "features", "feature_covariance"),
        ("2024 form, samples at width", "features", "preactivation_covariance"),
        ("rescaling", "features", "feature_covariance"),
        ("rescaling, convolution to linear", "features", "feature_covariance"),
        ("rescaling", "outgoing", "outgoing_covariance"),
    ],
)
def test_whitening_makes_white(name: str, side: Any, white: str) -> None:
    problem = case(name).problem()
    mt.teleport(problem.model, mt.WhiteningTeleporter(side), problem.inputs, None, problem.symmetries)
    covariance = covariances(problem)[white]
    if problem.symmetries[0].group.name == "diagonal":
        covariance = torch.diag(torch.diagonal(covariance))
    assert relative(covariance, torch.eye(len(covariance), dtype=torch.float64)) <= 1e-6


def test_whitening_does_not_stretch_what_is_not_there() -> None:
    problem = case("2022 form").problem()
    report = mt.teleport(problem.model, mt.WhiteningTeleporter(), problem.inputs, None, problem.symmetries)
    values = torch.linalg.eigvalsh(covariances(problem)["feature_covariance"])
    assert values.tolist() == pytest.approx([0, 1, 1, 1, 1], abs=1e-6)
    assert report.size < 20, "the fifth direction has no features and would be stretched by 1e6"


def bottleneck() -> tuple[nn.Module, Tensor, list[mt.Symmetry]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([[10.0], [1.0], [0.1]]))
    return model, torch.randn(9, 6, dtype=torch.float64), [mt.LinearPair(model, "0", "1")]


def test_balanced_factors_have_equal_covariances() -> None:
    model, inputs, symmetries = bottleneck()
    mt.teleport(model, mt.WhiteningTeleporter("balanced", damping=1e-13), inputs, None, symmetries)
    v, u = (value.detach() for value in model.parameters())
    assert relative(v @ v.mT, u.mT @ u) <= 1e-9


def test_alternating_whitens_one_side_and_then_the_other() -> None:
    model, inputs, symmetries = bottleneck()
    teleporter = mt.WhiteningTeleporter("alternating")
    one = torch.eye(3, dtype=torch.float64)
    state = None
    point = point_of(model, symmetries, (inputs,), None, lambda out: out.square().sum())[0]
    for name in ("feature_covariance", "outgoing_covariance", "feature_covariance"):
        point, _, state = travel(teleporter, point, symmetries, state)
        assert relative(symmetries[0].matrices(point)[name], one) <= 1e-8


def test_whitening_in_float32() -> None:
    model, inputs, symmetries = bottleneck()
    model, inputs = model.float(), inputs.float()
    report = mt.teleport(model, mt.WhiteningTeleporter(), inputs, None, symmetries)
    assert report.accepted
    assert report.drift < 1e-4
    features = model[0](inputs).detach()
    assert relative(features.mT @ features, torch.eye(3)) <= 1e-2
