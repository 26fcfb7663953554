"""Modules made to be claimed wrongly: none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import Written
from torch import Tensor, nn
from torch.nn import functional

import metateleport as mt
from metateleport.capture import point_of
from metateleport.detection.draws import random_element
from metateleport.detection.trace import observables
from metateleport.point import Point


def _pair(function: Callable[..., Any]) -> nn.Module:
    return Written(function, a=nn.Linear(4, 5), b=nn.Linear(5, 2))


def _tied() -> nn.Module:
    model = Written(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    return model


def _tied_far() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[4].weight = model[0].weight
    return model


def _buffer_alias() -> nn.Module:
    model = _pair(lambda m, x: m.b(torch.relu(m.a(x))) + m.seen.sum())
    model.register_buffer("seen", model.a.weight.data)
    return model


def _attribute_alias() -> nn.Module:
    model = _pair(lambda m, x: m.b(torch.relu(m.a(x))) + m.seen[0].sum())
    model.seen = [model.a.weight.detach()]
    return model


def _buffer_that_reads() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.norm.copy_(m.a.weight.detach().norm())
        return m.b(torch.relu(m.a(x))) * m.norm

    model = _pair(forward)
    model.register_buffer("norm", torch.zeros(()))
    return model


def _used_before_overwritten(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    other = m.b(h)
    h.relu_()
    return m.b(h) + other


def _branching(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(torch.tanh(h)) if h.sum() > 0 else m.b(torch.relu(h))


def _kept(m: Any, x: Tensor) -> Tensor:
    m.kept = torch.relu(m.a(x))
    return m.b(m.kept) + 1e-3 * m.kept.tanh().sum()


def _nearly(h: Tensor) -> Tensor:
    return h.relu() + 1e-7 * h.relu() ** 2


def _twice_used(m: Any, h: Tensor, second: Callable[[Tensor], Tensor]) -> Tensor:
    return m.b(h) + second(h)


def _one_layer_twice() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(5, 2))


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model[1].register_forward_hook(lambda *told: told[-1].clamp(max=10.0))
    return model


def _child_read_outside() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    return Written(lambda m, x: m.inner(x) + m.inner[0].weight.sum() if x.sum() > -1e3 else x, inner=inner)


NOTHING: dict[str, Callable[[], nn.Module]] = {
    "tied weights": _tied,
    "tied weights, far apart": _tied_far,
    "tied, transposed": lambda: Written(
        lambda m, x: functional.linear(torch.relu(m.a(x)), m.a.weight.T), a=nn.Linear(4, 6)
    ),
    "homogeneous below six": lambda: _pair(lambda m, x: m.b(functional.relu6(m.a(x)))),
    "nearly homogeneous": lambda: _pair(lambda m, x: m.b(_nearly(m.a(x)))),
    "homogeneous of degree zero": lambda: _pair(lambda m, x: m.b(functional.normalize(m.a(x).relu()))),
    "softplus that looks like ReLU": lambda: _pair(lambda m, x: m.b(functional.softplus(m.a(x), beta=1e3))),
    "a threshold": lambda: _pair(lambda m, x: m.b(m.a(x) * (m.a(x) > 0.1))),
    "a clamp far away": lambda: _pair(lambda m, x: m.b(m.a(x).clamp(0, 1e6))),
    "whole numbers": lambda: _pair(lambda m, x: m.b(m.a(x).to(torch.int64).to(x.dtype))),
    "a second use": lambda: _pair(lambda m, x: _twice_used(m, torch.relu(m.a(x)), lambda h: h.sum(-1, keepdim=True))),
    "a small second use": lambda: _pair(lambda m, x: _twice_used(m, torch.relu(m.a(x)), lambda h: 1e-6 * h.norm())),
    "a use that is kept": lambda: _pair(_kept),
    "a use put out": lambda: _pair(lambda m, x: {"y": m.b(torch.relu(m.a(x))), "features": [m.a(x)]}),
    "a number put out": lambda: _pair(lambda m, x: (m.b(torch.relu(m.a(x))), m.a(x).sum().item())),
    "a weight in the output": lambda: _pair(lambda m, x: m.b(torch.relu(m.a(x))) + m.a.weight.norm()),
    "a buffer of a weight's memory": _buffer_alias,
    "an attribute of a weight's memory": _attribute_alias,
    "a buffer that reads a weight": _buffer_that_reads,
    "overwritten after use": lambda: _pair(_used_before_overwritten),
    "a branch": lambda: _pair(_branching),
    "a branch on the side of a weight": _child_read_outside,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2)
    ),
    "spectral norm": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 2))
    ),
    "spectral norm of old": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.utils.spectral_norm(nn.Linear(5, 2))),
    "a hook": _hooked,
    "an LSTM": lambda: Written(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 3)),
}


BORDER = {"tied, transposed", "a use put out"}
"""Here the inputs or outputs of the model hold all in place, which is no reason to name."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_claimed(name: str) -> None:
    found = mt.find_symmetries(NOTHING[name](), torch.randn(6, 4))
    assert len(found) == 0, found
    if name not in BORDER:
        assert found.refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOTHING)
def test_what_is_claimed_on_a_batch_holds_there_in_the_model_itself(name: str) -> None:
    # In its own precision: a cast would part the tensors that share their memory.
    model = NOTHING[name]()
    inputs = torch.randn(3, 4)
    found = mt.find_symmetries(model, inputs)
    assert not found.exact
    if not found:
        return
    with torch.no_grad():
        expected = observables(model(inputs))
        for symmetry in reversed(found):
            element = random_element(symmetry.group, 0.5, torch.Generator().manual_seed(1), torch.float32)
            point, _ = point_of(model, [symmetry], (inputs,))
            for key, value in symmetry.act(element, point).parameters.items():
                model.get_parameter(key).copy_(value)
        for old, new in zip(expected, observables(model(inputs)), strict=True):
            assert float((new - old).norm()) <= 1e-4 * float(old.norm())


def _view_overwritten(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, :2].tanh_()
    return m.b(torch.relu(h))


def _entry_overwritten(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    h[:, 0] = 1.0
    return m.b(h)


def _old_weight_norm() -> nn.Module:
    first = nn.utils.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))


def _dropped_units(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.b(torch.cat((h[:, :3], h[:, 3:].sigmoid()), -1))


PARTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a view overwritten": (lambda: _pair(_view_overwritten), 3),
    "an entry overwritten": (lambda: _pair(_entry_overwritten), 4),
    "some units squashed": (lambda: _pair(_dropped_units), 3),
    "weight norm of old, the other layers": (_old_weight_norm, 3),
    "inside a child of a branch": (
        lambda: Written(
            lambda m, x: m.inner(x) if x.sum() > -1e3 else x,
            inner=nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
        ),
        5,
    ),
    "one layer twice moves as one": (
        _one_layer_twice,
        5,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARTS)
def test_what_remains_is_claimed_and_holds(name: str) -> None:
    build, dimension = PARTS[name]
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(6, 4).double()
    found = mt.find_symmetries(model, inputs)
    assert found.dimension == dimension
    fresh = torch.randn(9, 4).double()
    expected = model(fresh).detach()
    parameters = dict(model.named_parameters())
    for symmetry in found:
        element = random_element(symmetry.group, 1.0, torch.Generator().manual_seed(3), torch.float64)
        moved = symmetry.act(element, Point({name: value.detach() for name, value in parameters.items()}))
        with torch.no_grad():
            for key in symmetry.parameters:
                parameters[key].copy_(moved.parameters[key])
    assert torch.allclose(model(fresh), expected, rtol=1e-10)


def test_outputs_that_hide_tensors_are_refused() -> None:
    class Hidden:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    found = mt.find_symmetries(_pair(lambda m, x: Hidden(m.b(torch.relu(m.a(x))))), torch.randn(6, 4))
    assert len(found) == 0
    assert "Hidden" in found.refused[0].reason


def test_a_trace_leaves_the_settings_of_torch_as_they_were() -> None:
    class Lines(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.fx.config.do_not_emit_stack_traces)
            return super().forward(x)

    seen: list[bool] = []
    mt.find_symmetries(nn.Sequential(Lines(2, 3), nn.Linear(3, 2)), torch.ones(1, 2))
    assert set(seen) == {True, False}
    assert torch.fx.config.do_not_emit_stack_traces is False


def test_a_trace_leaves_no_tensor_of_its_own_behind() -> None:
    model = _pair(_kept)
    model.kept = None
    mt.find_symmetries(model, torch.randn(6, 4))
    assert model.kept is None
