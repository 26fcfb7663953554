"""Recording what passes through modules, and points made from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import channel_modules, modules_of, point_of, record, rows
from metateleport.point import Point


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)).double()


@pytest.mark.parametrize(
    ("shape", "batch", "channels", "expected"),
    [
        ((), 0, False, (1, 1)),
        ((5,), 1, False, (5, 1, 1)),
        ((3,), 0, False, (1, 3)),
        ((8, 3), 0, False, (8, 3)),
        ((8, 7, 3), 0, False, (56, 3)),
        ((8, 3, 7), 0, True, (56, 3)),
        ((8, 3, 5, 5), 0, True, (200, 3)),
        ((2, 8, 3), 1, False, (2, 8, 3)),
        ((2, 8, 7, 3), 1, False, (2, 56, 3)),
        ((2, 8, 3, 5, 5), 1, True, (2, 200, 3)),
    ],
)
def test_layouts(shape: tuple[int, ...], batch: int, channels: bool, expected: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    laid = rows(tensor, batch, channels)
    assert laid.shape == expected
    assert torch.equal(laid.flatten().sort().values, tensor.flatten().sort().values)


def test_rows_of_a_convolution_hold_one_position_each() -> None:
    tensor = torch.randn(2, 3, 4)
    assert torch.equal(rows(tensor, channels=True)[4 + 1], tensor[1, :, 1])


def test_recording_sees_inputs_and_outputs() -> None:
    model, x = chain(), torch.randn(5, 3, dtype=torch.float64)
    with record(model, ["0", "2"]) as recording:
        out = model(x)
    assert torch.equal(recording.inputs["0"], x)
    assert recording.outputs["2"] is out
    assert torch.equal(recording.activations()["2"], model[1](model[0](x)))
    assert list(recording.inputs) == ["0", "2"]
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = chain()
    with pytest.raises(RuntimeError, match="shapes"), record(model, ["0", "2"]):
        model(torch.randn(5, 7, dtype=torch.float64))
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), record(model, ["0"]):
        raise ZeroDivisionError
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="mine"):
        point_of(model, [mt.Rescaling(model, "0", "2")], (torch.ones(2, 3).double(),), None, _raise)
    assert hooks(model) == 0


def _raise(_: Tensor) -> Tensor:
    raise ValueError("mine")


def test_an_unknown_module_is_named_before_any_hook() -> None:
    model = chain()
    with pytest.raises(KeyError, match=r"no module named 'fc'.*'2'"), record(model, ["0", "fc"]):
        pass
    assert hooks(model) == 0


def test_adjusted_outputs_are_what_the_model_goes_on_with() -> None:
    model, x = chain(), torch.randn(5, 3, dtype=torch.float64)
    with record(model, ["2"], lambda _, output: output + 1) as recording:
        out = model(x)
    assert torch.equal(out, recording.outputs["2"] + 1)


def test_of_several_passes_the_last_one_stays() -> None:
    model = chain()
    with record(model, ["0"]) as recording:
        model(torch.zeros(5, 3, dtype=torch.float64))
        model(torch.ones(2, 3, dtype=torch.float64))
    assert recording.inputs["0"].shape == (2, 3)


def test_a_module_called_with_keywords_is_recorded() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    x = torch.randn(4, 3)
    model = Model()
    with record(model, ["layer", ""]) as recording:
        model(x=x)
    assert recording.inputs["layer"] is x
    assert recording.inputs[""] is x


def test_names_and_channels() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 1))
    symmetries = [mt.Rescaling(model, "0", "3"), mt.LinearPair(model, "3", "4")]
    assert modules_of(symmetries) == ("0", "3", "4")
    assert channel_modules(model, modules_of(symmetries)) == {"0": True, "3": False, "4": False}


def test_a_point_has_the_gradients_of_autograd() -> None:
    model, x = chain(), torch.randn(5, 3, dtype=torch.float64)
    point, outputs = point_of(model, [mt.Rescaling(model, "0", "2")], (x,), None, lambda out: out.square().sum())
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(point.gradients[name], parameter.grad, rtol=1e-12)
    assert torch.equal(outputs, model(x).detach())
    assert torch.allclose(point.cotangents["2"], 2 * outputs)
    assert not any(value.requires_grad for value in (*point.parameters.values(), *point.gradients.values(), outputs))
    expected = sum(float(parameter.grad.square().sum()) for parameter in model.parameters())
    assert float(point.squared_gradient_norm()) == pytest.approx(expected)
    assert float(point.squared_gradient_norm(frozenset({"2.bias"}))) == pytest.approx(
        float(model[2].bias.grad.square().sum())
    )


def test_without_a_loss_a_point_has_activations_only() -> None:
    model = chain()
    point, _ = point_of(model, [mt.Rescaling(model, "0", "2")], (torch.ones(5, 3).double(),))
    assert not point.gradients
    assert not point.cotangents
    assert point.loss is None
    assert set(point.activations) == {"0", "2"}


def test_evaluating_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for loss in (None, lambda out: out.sum()):
        point_of(model, [], (torch.randn(5, 3).double(),), None, loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_have_no_gradient() -> None:
    model = chain()
    model[0].requires_grad_(False)
    point, _ = point_of(model, [], (torch.ones(5, 3).double(),), None, lambda out: out.sum())
    assert set(point.gradients) == {"2.weight", "2.bias"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        point_of(model, [], (torch.ones(5, 3).double(),), None, lambda out: out.sum())


def test_an_activation_in_place_does_not_spoil_cotangents() -> None:
    points = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2), nn.ReLU(inplace=inplace))
        points.append(point_of(model, [mt.Rescaling(model, "0", "2")], (torch.ones(5, 3),), None, torch.sum)[0])
    for name in ("0", "2"):
        assert torch.equal(points[0].cotangents[name], points[1].cotangents[name])


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    model = chain()
    with pytest.raises(ValueError, match=r"scalar; it has shape \(5, 2\)"):
        point_of(model, [], (torch.ones(5, 3).double(),), None, lambda out: out)


def test_pullback_is_the_backward_pass_below_a_module() -> None:
    model, x = chain(), torch.randn(5, 3, dtype=torch.float64)
    point, _ = point_of(model, [mt.Rescaling(model, "0", "2")], (x,), None, lambda out: out.square().sum())
    assert point.pullback is not None
    lower, cotangents = point.pullback("2", point.cotangents["2"] @ point.parameters["2.weight"])
    assert set(lower) == {"0.weight", "0.bias"}
    for name, value in lower.items():
        assert torch.allclose(value, point.gradients[name], rtol=1e-12)
    assert torch.allclose(cotangents["0"], point.cotangents["0"], rtol=1e-12)
    assert point.pullback("0", torch.ones(5, 3).double()) == ({}, {})


def test_choosing_between_points_takes_whole_tasks() -> None:
    a = Point({"w": torch.ones(3, 2)}, {"w": torch.ones(3, 2)}, loss=torch.ones(3), stale=frozenset({"w"}))
    b = Point({"w": torch.zeros(3, 2)}, {"w": torch.zeros(3, 2)}, loss=torch.zeros(3))
    chosen = a.choose(torch.tensor([True, False, True]), b)
    assert chosen.parameters["w"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert chosen.loss is not None
    assert chosen.loss.tolist() == [1, 0, 1]
    assert chosen.stale == {"w"}
    assert torch.equal(a.choose(torch.tensor(True), a).parameters["w"], a.parameters["w"])
