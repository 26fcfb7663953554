"""Ways to call `teleport`: inputs, symmetries, losses, training mode."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import case, relative
from teleporter_cases import snapshot, untouched
from torch import Tensor, nn

import metateleport as mt
from metateleport.symmetries import Unsuitable
from metateleport.teleporters import travel


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x + shift)))


def test_inputs_as_tensor_tuple_and_dict() -> None:
    x, shift = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    results = []
    for inputs in ((x, shift), [x, shift], {"shift": shift, "x": x}):
        torch.manual_seed(0)
        model = TwoInputs().double()
        outputs = model(x, shift).detach()
        symmetries = [mt.Rescaling(model, "first", "second")]
        report = mt.teleport(model, mt.RandomTeleporter(seed=0), inputs, None, symmetries)
        assert report.accepted
        assert relative(model(x, shift), outputs) <= 1e-12
        results.append(model.first.weight.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_symmetries_of_a_sequential_are_found() -> None:
    problem = case("chain of rescalings").problem()
    report = mt.teleport(problem.model, mt.RandomTeleporter(seed=0), problem.inputs[0])
    assert report.accepted
    assert len(report.sizes) == 2
    assert math.isnan(report.loss_before)
    assert math.isnan(report.loss_after)
    assert math.isnan(report.gradient_norm_before)


def test_models_without_symmetries_are_told_how_to_name_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(Unsuitable, match=r"Sequential.*symmetries=\[metateleport.Rescaling\(model, first, second\)"):
        mt.teleport(model, mt.RandomTeleporter(seed=0), torch.ones(2, 3))
    with pytest.raises(ValueError, match="no symmetry to move along"):
        mt.teleport(model, mt.RandomTeleporter(seed=0), torch.ones(2, 3), symmetries=[])
    assert untouched(model, before)


def test_a_teleporter_that_looks_at_gradients_asks_for_a_loss() -> None:
    problem = case("rescaling").problem()
    with pytest.raises(ValueError, match="pass loss="):
        mt.teleport(problem.model, mt.GradientAscentTeleporter(), problem.inputs, None, problem.symmetries)
    with pytest.raises(ValueError, match="needs gradients"):
        travel(mt.GradientAscentTeleporter(), problem.point().replace(gradients={}), problem.symmetries)


@pytest.mark.parametrize("seed", [0, None])
def test_in_training_mode_dropout_and_normalisation_do_not_matter(seed: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2), nn.Dropout(0.2)
    ).double()
    before = snapshot(model)
    x = torch.randn(9, 3, dtype=torch.float64)
    report = mt.teleport(model, mt.RandomTeleporter(seed=seed), x, lambda out: out.square().sum())
    assert report.accepted
    assert report.drift <= 1e-12
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-12)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])


def test_a_frozen_layer_elsewhere_is_no_hindrance() -> None:
    problem = case("chain of rescalings").problem()
    problem.model[0].requires_grad_(False)  # type: ignore[index]
    outputs = problem.outputs()
    report = mt.teleport(problem.model, mt.GradientAscentTeleporter(), problem.inputs, problem.loss_of)
    parameters = [value for value in problem.model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(problem.loss_of(problem.model(*problem.inputs)), parameters)
    assert report.accepted
    assert relative(problem.outputs(), outputs) <= 1e-12
    assert report.gradient_norm_after == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
