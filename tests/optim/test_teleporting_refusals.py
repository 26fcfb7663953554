"""Steps without a forward pass, teleports that are refused, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_cases import assert_close, case, relative
from teleporting_cases import (
    INNER,
    Pushing,
    backward,
    closure_of,
    each_problem,
    everything,
    fresh_gradients,
    frozen_steps,
    gradients,
    hooks,
    same,
    train,
    wrap,
)
from torch import Tensor, nn

import metateleport as mt
from metateleport.optim import TeleportingOptimizer
from metateleport.symmetries import Unsuitable
from metateleport.teleporters import TrustRegion


def test_a_step_without_a_forward_pass_says_so() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem)
    before = everything(problem, optimizer)
    with pytest.warns(UserWarning, match=r"no forward pass of the model since the last step.*example_input="):
        optimizer.step()
    with torch.no_grad():
        problem.model(*problem.inputs)
    optimizer.step()
    assert same(before, everything(problem, optimizer))
    # The inner optimizer steps as ever, and the report says why there was no teleport.
    bare = case("linear pair").problem()
    inner = torch.optim.SGD(bare.model.parameters(), lr=0.1)
    optimizer = wrap(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), every=1)
    for each, stepping in ((problem, optimizer), (bare, inner)):
        each.loss_of(each.model(*each.inputs)).backward()
        each.model.eval()
        if stepping is optimizer:
            with pytest.warns(UserWarning, match="in training mode and the model now is in evaluation mode"):
                stepping.step()
        else:
            stepping.step()
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert "in evaluation mode" in optimizer.last_report.reason
    for value, expected in zip(problem.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(value, expected)
    ascending = wrap(problem, teleporter=mt.GradientAscentTeleporter())
    problem.model.train()(*problem.inputs)
    ascending.zero_grad()
    with pytest.warns(UserWarning, match=r"call backward\(\) before step"):
        ascending.step()


def test_a_pass_is_good_for_one_step_only() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, every=1)
    backward(problem, optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="no forward pass"):
        optimizer.step()
    assert [each.accepted for each in optimizer.reports] == [True, False]


def test_an_example_stands_in_for_a_forward_pass() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, frozen_steps(problem), example_input=problem.inputs)
    named = dict(problem.model.named_parameters())
    for name, value in fresh_gradients(problem).items():
        named[name].grad = value
    optimizer._recorder.clear()  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    assert optimizer.last_report.evaluations == pytest.approx(2 / 3)
    assert_close(gradients(problem.model), fresh_gradients(problem), 1e-10)


@each_problem
@pytest.mark.parametrize("region", [{"max_drift": 0.0}, {"max_size": 0.1}, {"max_condition": 1.0001}])
def test_what_is_refused_leaves_everything_bit_for_bit(name: str, region: dict[str, float]) -> None:
    problem = case(name).problem()
    inner = torch.optim.Adam(problem.model.parameters(), lr=0.0, betas=(0.9, 0.99))
    optimizer = wrap(problem, inner, mt.NoTeleport(), every=5)
    train(problem, optimizer, 5)
    optimizer.teleporter = mt.RandomTeleporter(size=0.5, seed=0, trust_region=TrustRegion(**region))
    seen: list[dict[str, Tensor]] = []
    inner.register_step_pre_hook(lambda *_: seen.append(everything(problem, inner)))
    backward(problem, optimizer)
    before = everything(problem, inner)
    optimizer.step()
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert optimizer.last_report.reason
    assert optimizer.last_report.size == optimizer.last_report.drift == 0.0
    assert same(before, seen[0])


def test_a_value_that_is_not_finite_never_reaches_the_weights() -> None:
    problem = case("rescaling").problem()
    generator = torch.tensor([800.0, 0, 0, 0], dtype=torch.float64)
    teleporter = Pushing(generator, max_size=1e4, max_condition=float("inf"), max_drift=float("inf"))
    optimizer = wrap(problem, frozen_steps(problem), teleporter)
    before = everything(problem, optimizer)
    optimizer.step(closure_of(problem, optimizer))
    optimizer.zero_grad()
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert same(before, everything(problem, optimizer))


def test_what_is_frozen_later_is_not_moved() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, frozen_steps(problem))
    problem.model[0].weight.requires_grad_(False)  # type: ignore[index]
    before = {name: value.detach().clone() for name, value in problem.model.named_parameters()}
    optimizer.step(closure_of(problem, optimizer))
    assert optimizer.last_report is not None
    assert "is frozen" in optimizer.last_report.reason
    assert all(torch.equal(value, before[name]) for name, value in problem.model.named_parameters())


def test_dropout_and_batch_norm_are_repeated_and_not_disturbed() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        ).double()

    inputs = torch.randn(8, 3, dtype=torch.float64)
    results = []
    for teleports in (True, False):
        model = build()
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        symmetries = [mt.Rescaling(model, "0", "3")]
        optimizer: Any = inner
        if teleports:
            optimizer = TeleportingOptimizer(inner, model, mt.RandomTeleporter(size=0.5, seed=0), symmetries, every=1)
        torch.manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        if teleports:
            assert max(report.drift for report in optimizer.reports) < 1e-12
            assert min(report.size for report in optimizer.reports) > 0
        results.append((torch.rand(3), dict(model.named_buffers())))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert relative(value.double(), results[1][1][name].double()) < 1e-12


def test_bad_input_is_named() -> None:
    problem, other = case("linear pair").problem(), case("linear pair").problem()
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every is the number of steps"):
            wrap(problem, every=every)
    with pytest.raises(ValueError, match="state is one of transport, keep, reset, not 'drop'"):
        wrap(problem, state="drop")
    with pytest.raises(ValueError, match="not the model's"):
        wrap(problem, INNER["sgd"](other.model.parameters()))
    with pytest.raises(ValueError, match=r"'1.weight', which the optimizer does not hold"):
        wrap(problem, INNER["sgd"](problem.model[0].parameters()))  # type: ignore[index]
    with pytest.raises(ValueError, match="no symmetry to move along"):
        wrap(problem, symmetries=[])
    with pytest.raises(TypeError, match=r"torch.optim optimizer, not a Sequential"):
        wrap(problem, problem.model)
    with pytest.raises(TypeError, match=r"a metateleport.Teleporter, not a str"):
        wrap(problem, teleporter="random")
    wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="which the model does not have"):
        wrap(problem, symmetries=[mt.LinearPair(wide, "1", "2")])
    problem.model[0].weight.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(ValueError, match="is frozen"):
        wrap(problem)
    assert hooks(problem.model) == 0


def test_a_symmetry_that_does_not_hold_is_found_on_the_example() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(Unsuitable, match="does not hold in this model"):
        TeleportingOptimizer(inner, model, mt.NoTeleport(), [mt.Rescaling(model, "0", "2")], example_input=inputs)
    assert hooks(model) == 0


def test_outputs_may_be_nested() -> None:
    class Wrapped(nn.Module):
        def __init__(self, chain: nn.Module) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, *, x: Tensor) -> dict[str, Any]:
            return {"logits": self.chain(x), "more": (None, torch.tensor(3))}

    problem = case("linear pair").problem()
    model = Wrapped(problem.model)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    pair = mt.LinearPair(model, "chain.0", "chain.1")
    optimizer = TeleportingOptimizer(inner, model, mt.RandomTeleporter(seed=0), [pair])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(model(x=problem.inputs[0])["logits"])
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_report
    assert report is not None
    assert report.accepted
    assert 0 < report.drift < 1e-12
    assert report.loss_after == pytest.approx(report.loss_before)
