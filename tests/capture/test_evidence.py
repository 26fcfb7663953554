"""The recorded pass, held against the gradients that a step is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from learned_cases import batch, loss_of, mlp
from torch import Tensor, nn

from metateleport.capture import PassRecorder
from metateleport.capture.evidence import Evidence, evidence_of
from metateleport.optim.parameters import raised

MODULES = ("0", "2")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: raised(value.grad, torch.promote_types(value.dtype, torch.float32))
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def seen(model: nn.Module, passes: int = 1, change: Callable[[nn.Module], None] = lambda _: None) -> Evidence:
    """What the recorder says after some passes, with the gradients changed then."""
    recorder = PassRecorder(model, MODULES, replays=False)
    for number in range(passes):
        loss_of(model, number).backward()
    change(model)
    return evidence_of(recorder, gradients_of(model))


def scaled(**factors: float) -> Callable[[nn.Module], None]:
    """Multiplies gradients of the layers `first` and `last`."""

    def change(model: nn.Module) -> None:
        for name, value in model.named_parameters():
            value.grad *= factors.get("first" if name.startswith("0") else "last", 1.0)

    return change


def assert_explains(evidence: Evidence, model: nn.Module) -> None:
    """Cotangents and activations give the gradients as they are."""
    gradients = gradients_of(model)
    for name in MODULES:
        product = evidence.cotangents[name].mT @ evidence.activations[name]
        torch.testing.assert_close(product, gradients[f"{name}.weight"])
        torch.testing.assert_close(evidence.cotangents[name].sum(-2), gradients[f"{name}.bias"])


def test_one_pass_fits_its_loss() -> None:
    model = mlp()
    evidence = seen(model)
    assert evidence.loss_fits
    assert evidence.checked
    assert_explains(evidence, model)


@pytest.mark.parametrize("factors", [{"first": 0.25}, {"first": 2.0, "last": 2.0}, {"first": 1e-6, "last": 1e6}])
def test_a_factor_of_each_tensor_is_found_and_the_loss_does_not_fit(factors: dict[str, float]) -> None:
    model = mlp()
    evidence = seen(model, change=scaled(**factors))
    assert evidence.checked
    assert not evidence.loss_fits
    assert_explains(evidence, model)


def test_clipping_by_the_norm_is_a_factor() -> None:
    model = mlp()
    evidence = seen(model, change=lambda each: nn.utils.clip_grad_norm_(each.parameters(), 1e-3))
    assert not evidence.loss_fits
    assert_explains(evidence, model)
    loose = seen(mlp(), change=lambda each: nn.utils.clip_grad_norm_(each.parameters(), 1e6))
    assert loose.loss_fits


def test_clipping_entry_by_entry_does_not_agree() -> None:
    model = mlp()
    evidence = seen(model, change=lambda each: nn.utils.clip_grad_value_(each.parameters(), 0.05))
    assert evidence == Evidence(checked=True)


def test_gradients_that_point_the_other_way_do_not_agree() -> None:
    assert seen(mlp(), change=scaled(first=-1.0)) == Evidence(checked=True)


def test_one_tensor_that_does_not_agree_speaks_for_all() -> None:
    def noise(model: nn.Module) -> None:
        model[0].weight.grad += 0.1 * torch.rand(5, 3)  # type: ignore[index]

    assert seen(mlp(), change=noise) == Evidence(checked=True)


def test_a_sum_over_several_passes_does_not_agree_and_fits_a_loss_unless_it_was_shortened() -> None:
    evidence = seen(mlp(), passes=3)
    assert evidence == Evidence(loss_fits=True, checked=True)
    assert seen(mlp(), passes=3, change=scaled(first=1e-3, last=1e-3)) == Evidence(checked=True)


def test_a_gradient_that_the_pass_knows_nothing_of_does_not_agree() -> None:
    model = mlp()
    recorder = PassRecorder(model, MODULES, replays=False)
    loss_of(model).backward()
    before = gradients_of(model)
    model.zero_grad()
    recorder.clear()
    (0 * loss_of(model)).backward()
    assert evidence_of(recorder, before) == Evidence(checked=True)


def test_a_gradient_of_zero_tells_nothing_against_the_others() -> None:
    def cleared(model: nn.Module) -> None:
        for value in model[0].parameters():  # type: ignore[index]
            value.grad.zero_()

    evidence = seen(mlp(), change=cleared)
    assert set(evidence.activations) == set(MODULES)
    assert evidence.checked


def test_without_a_pass_there_is_no_evidence() -> None:
    model = mlp()
    recorder = PassRecorder(model, MODULES, replays=False)
    loss_of(model).backward()
    recorder.clear()
    assert evidence_of(recorder, gradients_of(model)) == Evidence()


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_given_room_and_single_precision_is_not(autocast: bool) -> None:
    def off_by(size: float) -> Evidence:
        model = mlp(torch.float32)
        recorder = PassRecorder(model, MODULES, replays=False)
        x, y = batch(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        (out.float() - y).square().mean().backward()
        gradients = gradients_of(model)
        for value in gradients.values():
            value[..., 0] *= 1 + size
        return evidence_of(recorder, gradients)

    assert bool(off_by(0.0).activations)
    assert bool(off_by(0.01).activations) == autocast
    assert not off_by(0.3).activations


def test_the_working_precision_is_that_of_the_gradients() -> None:
    model = mlp(torch.bfloat16)
    evidence = seen(model)
    assert {value.dtype for value in (*evidence.activations.values(), *evidence.cotangents.values())} == {torch.float32}


@pytest.mark.parametrize("passes", [1, 2])
def test_where_nothing_can_be_held_against_it_one_pass_is_taken_and_several_are_not(passes: int) -> None:
    model = mlp()
    recorder = PassRecorder(model, ("0",), replays=False)
    for number in range(passes):
        loss_of(model, number).backward()
    others = {name: value for name, value in gradients_of(model).items() if name.startswith("2")}
    evidence = evidence_of(recorder, others)
    assert not evidence.checked
    assert not evidence.loss_fits
    assert set(evidence.activations) == set(evidence.cotangents) == ({"0"} if passes == 1 else set())


def test_a_module_without_a_gradient_takes_the_usual_factor() -> None:
    model = mlp()
    recorder = PassRecorder(model, MODULES, replays=False)
    loss_of(model).backward()
    whole = evidence_of(recorder, gradients_of(model))
    scaled(first=0.5, last=0.5)(model)
    others = {name: value for name, value in gradients_of(model).items() if name.startswith("2")}
    evidence = evidence_of(recorder, others)
    torch.testing.assert_close(evidence.cotangents["0"], 0.5 * whole.cotangents["0"])


def test_a_convolution_is_held_against_its_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2)).double()
    recorder = PassRecorder(model, ("0",), replays=False)
    for agrees in (True, False):
        # The second time gradients add up.
        model(torch.randn(4, 2, 6, dtype=torch.float64)).square().sum().backward()
        evidence = evidence_of(recorder, gradients_of(model))
        assert evidence.checked
        assert bool(evidence.activations) == agrees
