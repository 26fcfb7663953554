"""What a symmetry refuses of a model, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import metateleport as mt
from metateleport.symmetries import (
    BatchPair2022,
    BatchPair2024,
    QuadraticRotation,
    Unsuitable,
)


def _linear(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def _tied() -> nn.Sequential:
    model = _linear(3, 3, 3)
    model[1].weight = model[0].weight
    return model


def _one_layer_twice() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _frozen(name: str) -> nn.Sequential:
    model = _linear(3, 4, 2)
    model.get_parameter(name).requires_grad_(False)
    return model


def _normed() -> nn.Sequential:
    model = _linear(3, 4, 2)
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _old_normed() -> nn.Sequential:
    model = _linear(3, 4, 2)
    nn.utils.spectral_norm(model[1])
    return model


REFUSED: list[tuple[str, Callable[[], object], str]] = [
    ("unknown first", lambda: mt.LinearPair(_linear(3, 4, 2), "7", "1"), "no module named '7'.*'0', '1'"),
    ("unknown second", lambda: mt.Rescaling(_linear(3, 4, 2), "0", "fc"), "no module named 'fc'"),
    ("another type", lambda: mt.LinearPair(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "0", "1"), "'0' is a ReLU"),
    ("convolution", lambda: mt.LinearPair(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), "0", "1"), "Conv1d"),
    (
        "transposed",
        lambda: mt.Rescaling(nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Linear(2, 2)), "0", "1"),
        "Trans",
    ),
    ("sizes", lambda: mt.LinearPair(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "0", "1"), "outputs 4 .* reads 5"),
    (
        "multiple",
        lambda: mt.Rescaling(nn.Sequential(nn.Linear(3, 4), nn.Linear(8, 2)), "0", "1"),
        "outputs 4 .* reads 8",
    ),
    (
        "channels",
        lambda: mt.Rescaling(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(8, 2, 1)), "0", "1"),
        "outputs 4 .* reads 8",
    ),
    (
        "grouped",
        lambda: mt.Rescaling(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1, groups=2)), "0", "1"),
        "in each group",
    ),
    ("itself", lambda: mt.LinearPair(_linear(3, 3), "0", "0"), "same layer"),
    ("one layer twice", lambda: mt.Rescaling(_one_layer_twice(), "0", "2"), "same layer"),
    ("tied weights", lambda: mt.LinearPair(_tied(), "0", "1"), "shared"),
    ("frozen weight", lambda: mt.LinearPair(_frozen("1.weight"), "0", "1"), "'1.weight' is frozen"),
    ("frozen bias", lambda: mt.LinearPair(_frozen("0.bias"), "0", "1"), "'0.bias' is frozen"),
    ("weight norm", lambda: mt.LinearPair(_normed(), "0", "1"), "not a plain parameter"),
    ("spectral norm", lambda: mt.LinearPair(_old_normed(), "0", "1"), "not a plain parameter"),
    ("no inverse", lambda: BatchPair2022(_linear(3, 4, 2), "0", "1", nn.Tanh()), "no known inverse.*2024"),
    ("half inverse", lambda: BatchPair2022(_linear(3, 4, 2), "0", "1", nn.ReLU()), "no known inverse"),
    ("no module", lambda: BatchPair2024(_linear(3, 4, 2), "0", "1", torch.tanh), "give the activation as a module"),
    ("with parameters", lambda: BatchPair2024(_linear(3, 4, 2), "0", "1", nn.PReLU()), "parameters of its own"),
    ("no vector", lambda: QuadraticRotation(_linear(3, 4), "x"), "no vector named 'x'.*0.weight"),
    ("a matrix", lambda: QuadraticRotation(_linear(3, 4), "0.weight"), "no vector named"),
    ("frozen vector", lambda: QuadraticRotation(_frozen("0.bias"), "0.bias"), "frozen"),
]


@pytest.mark.parametrize(("build", "says"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_unsuitable_models_are_refused_by_name(build: Callable[[], object], says: str) -> None:
    with pytest.raises(Unsuitable, match=f"(?s){says}"):
        build()


def test_an_unfrozen_second_bias_may_be_anything() -> None:
    assert mt.LinearPair(_frozen("1.bias"), "0", "1").parameters == ("0.weight", "0.bias", "1.weight")
