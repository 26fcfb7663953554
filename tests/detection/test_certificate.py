"""The certificate: it refuses what does not hold, wherever the wrong may hide."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.detection.draws import fresh_inputs, random_element, random_elements, randomise
from metateleport.detection.rules import RULES
from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.point import Point
from metateleport.symmetries import axes
from metateleport.symmetries.axes import AxisSymmetry, Leg
from metateleport.symmetries.lora import LoRAPair
from metateleport.symmetries.translation import Absorber, BiasTranslation


def whole(size: int) -> Tensor:
    return torch.arange(size).unsqueeze(0)


def test_true_claims_pass_and_say_how_they_were_measured() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    (certificate,) = mt.certify(model, [mt.Rescaling(model, "0", "2")], (torch.randn(5, 3),))
    assert certificate.holds
    assert 0 < certificate.drift <= 1e-12
    assert certificate.dtype == torch.float64
    assert certificate.weights == 3
    assert certificate.sizes == (0.3, 1.0, 3.0)


@pytest.mark.parametrize("unit", [nn.Tanh(), nn.ReLU6(), nn.Softplus(beta=30), nn.GELU()])
def test_a_rescaling_through_what_is_not_homogeneous_is_refused(unit: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), unit, nn.Linear(4, 2))
    (certificate,) = mt.certify(model, [mt.Rescaling(model, "0", "2")], (torch.randn(50, 3),))
    assert not certificate.holds
    assert "outputs drift by" in certificate.reason


def test_a_zero_factor_hides_nothing() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.lora_B.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.lora_B(self.lora_A(x))

    legs = [axes.Leg("lora_A.weight", whole(2), 0), axes.Leg("lora_B.weight", whole(2), 1)]
    wrong = LoRAPair(GeneralLinear(2), legs)
    right = LoRAPair(GeneralLinear(2), [legs[0], axes.Leg("lora_B.weight", whole(2), 1, dual=True)])
    model = Adapter()
    certificates = mt.certify(model, [wrong, right], (torch.randn(5, 4),))
    assert [each.holds for each in certificates] == [False, True]
    assert "random weights" in certificates[0].reason


def test_zero_biases_and_unit_gains_hide_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[0].bias)
    column, row = torch.arange(4).reshape(4, 1), torch.arange(4).reshape(1, 4)
    forgets = axes.AxisSymmetry(
        PositiveDiagonal(4), [axes.Leg("0.weight", column), axes.Leg("2.weight", row, dual=True)]
    )
    (certificate,) = mt.certify(model, [forgets], (torch.randn(5, 3),))
    assert "random weights" in certificate.reason


def test_what_holds_on_the_given_input_only_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    # The first input is always zero, so that its column of the first layer seems to be free.
    places = torch.tensor([[0, -1, -1]])
    free = axes.AxisSymmetry(PositiveDiagonal(1), [axes.Leg("0.weight", places)])
    given = torch.randn(5, 3)
    given[:, 0] = 0
    (certificate,) = mt.certify(model, [free], (given,))
    assert not certificate.holds


def test_a_false_one_among_many_is_found_and_the_others_pass() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    claims = [mt.Rescaling(model, *pair) for pair in (("0", "2"), ("2", "4"), ("4", "6"))]
    certificates = mt.certify(model, claims, (torch.randn(7, 3),))
    assert [each.holds for each in certificates] == [True, False, True]


def test_a_translation_with_the_wrong_absorber_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    bias = axes.Leg("0.bias", whole(4))
    claims = [BiasTranslation(bias, [Absorber(f"{i}.weight", f"{i}.bias", whole(4), 1, 0)]) for i in (1, 2)]
    assert [each.holds for each in mt.certify(model, claims, (torch.randn(5, 3),))] == [True, False]


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    monkeypatch.setitem(RULES, "tanh", RULES["relu"])
    found = mt.find_symmetries(model, torch.randn(5, 3))
    assert len(found) == 0
    assert any("outputs drift by" in each.reason for each in found.refused)


def test_the_model_is_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    mt.certify(
        model, [mt.LinearPair(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", "1")][:0], (torch.ones(2, 3),)
    )
    mt.find_symmetries(model, torch.randn(8, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class SinglePrecision(nn.Module):
    """Runs in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("float32 only")
        return self.b(torch.relu(self.a(x)))


def test_a_model_of_one_precision_is_certified_in_it() -> None:
    (found,) = mt.find_symmetries(SinglePrecision(), torch.randn(5, 3))
    assert found.certificate is not None
    assert found.certificate.dtype == torch.float32
    assert 1e-9 < found.drift <= 1e-4


def test_fresh_inputs_are_of_the_same_kind() -> None:
    given = {
        "x": torch.randn(4, 3) * 5 + 2,
        "tokens": torch.randint(3, 40, (2, 7)),
        "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "flag": torch.tensor([True, False]),
        "ones": torch.ones(3),
        "none": None,
    }
    fresh = fresh_inputs(given, seed=1)
    assert not torch.equal(fresh["x"], given["x"])
    assert not torch.equal(fresh["tokens"], given["tokens"])
    assert int(fresh["tokens"].min()) >= int(given["tokens"].min())
    assert int(fresh["tokens"].max()) <= int(given["tokens"].max())
    for name in ("mask", "flag", "ones"):
        assert torch.equal(fresh[name], given[name])
    assert fresh["none"] is None
    assert torch.equal(fresh_inputs(given, seed=1)["x"], fresh["x"])


def test_randomised_copies_leave_nothing_at_zero_or_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    randomise(model, 1.0, seed=0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert bool(((value != 0) & (value != 1)).all()), name
    assert bool((model[1].running_var > 0).all())


@pytest.mark.parametrize("group", [GeneralLinear(3), PositiveDiagonal(7)], ids=repr)
def test_random_elements_have_the_size_asked_for(group: Group) -> None:
    element = random_element(group, 0.7, torch.Generator().manual_seed(0), torch.float64)
    if element.ndim == 1:
        assert float(element.log().norm()) == pytest.approx(0.7)
    assert element.shape == group.shape


def test_elements_drawn_together_are_those_drawn_one_by_one() -> None:
    groups = [GeneralLinear(3), PositiveDiagonal(4), GeneralLinear(130), GeneralLinear(3), Orthogonal(3)]

    def sources() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(place) for place in range(len(groups))]

    together = random_elements(groups, 0.7, sources(), torch.float64, [None] * len(groups))
    for group, source, found in zip(groups, sources(), together, strict=True):
        assert torch.allclose(found, random_element(group, 0.7, source, torch.float64), atol=1e-14)
        if group.size < 130:
            unit = group.identity(dtype=torch.float64)
            assert torch.allclose(group.compose(found, group.inverse(found)), unit, atol=1e-13)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (5, 6), (6, 3, 2), (4, 6, 2), (3, 2, 6)], ids=str)
@pytest.mark.parametrize("start", [None, 0, 2])
def test_what_is_overwritten_is_what_the_action_gives(shape: tuple[int, ...], start: int | None) -> None:
    axis, size = shape.index(6), 4
    places = torch.tensor([[5, 0, 3, 2]]) if start is None else torch.arange(start, start + size).unsqueeze(0)
    symmetry = AxisSymmetry(GeneralLinear(size), [Leg("a", places, axis), Leg("b", places, axis, dual=True)])
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name in ("a", "b")}
    element = symmetry.group.random(seed=0, dtype=torch.float64)
    moved = symmetry.act(element, Point({name: value.clone() for name, value in tensors.items()})).parameters
    symmetry.overwrite(element, tensors)
    for name, value in tensors.items():
        assert torch.allclose(value, moved[name], atol=1e-14), name
