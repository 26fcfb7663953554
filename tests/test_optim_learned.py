"""A learned optimizer that goes on from its state dict takes the same steps."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from symmetry_cases import Problem, case
from torch import Tensor

import metateleport as mt
from metateleport.learned import MODES, StackOptimizer
from metateleport.learned.gauge import LearnedGauge


def meta_of(mode: str, network: str = "equivariant", problem: Problem | None = None) -> mt.MetaOptimizer:
    """A meta-optimizer with a teleport large enough to be seen."""
    torch.manual_seed(1)
    shapes: tuple[Any, ...] = ()
    if problem is not None and network == "flat":
        stack = mt.StackedModel([problem.model], problem.loss, problem.symmetries)
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in stack.tensors().items())
    config = mt.MetaOptimizerConfig(mode=mode, network=network, hidden=6, shapes=shapes, base="momentum")  # type: ignore[arg-type]
    meta = mt.MetaOptimizer(config)
    if isinstance(meta.teleporter, mt.LearnedTeleporter):
        with torch.no_grad():
            for each in meta.teleporter.networks.values():
                each.head.bias[-1] = 0.0
                each.head.weight.copy_((torch.rand(each.head.weight.shape) - 0.5) / 4)
    return meta.double()


def train(problem: Problem, optimizer: mt.LearnedOptimizer, steps: int) -> list[Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(problem.model(*problem.inputs))
        loss.backward()
        return loss

    trajectory = []
    for _ in range(steps):
        optimizer.step(closure)
        trajectory.append(torch.cat([each.detach().flatten() for each in problem.model.parameters()]))
    return trajectory


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", ["equivariant", "flat"])
@pytest.mark.parametrize("name", ["linear pair", "2022 form"])
def test_it_goes_on_with_the_same_steps(mode: str, network: str, name: str) -> None:
    problem, resumed = case(name).problem(), case(name).problem()
    meta = meta_of(mode, network, problem)
    optimizer = mt.LearnedOptimizer(problem.model, meta, problem.symmetries)
    train(problem, optimizer, 5)
    saved = through_a_file({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(problem, optimizer, 5)
    resumed.model.load_state_dict(saved["model"])
    other = mt.LearnedOptimizer(resumed.model, meta, resumed.symmetries)
    other.load_state_dict(saved["optimizer"])
    # Saved again before it was used, nothing is lost.
    other.load_state_dict(through_a_file(other.state_dict()))
    for mine, theirs in zip(train(resumed, other, 5), expected, strict=True):
        assert torch.equal(mine, theirs)
    # Forgetting shows.
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict({key: value for key, value in saved["optimizer"].items() if key != "learned"})
    assert not torch.equal(train(resumed, other, 5)[-1], expected[-1])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["linear pair", "rescaling"])
def test_its_gauges_go_on_too(name: str, deterministic: bool) -> None:
    problem, resumed = case(name).problem(), case(name).problem()
    torch.manual_seed(1)
    meta = mt.MetaOptimizer(mt.MetaOptimizerConfig(stays=False, gauge="exact", hidden=6)).double()
    optimizer = mt.LearnedOptimizer(problem.model, meta, problem.symmetries, deterministic)
    train(problem, optimizer, 5)
    saved = through_a_file({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(problem, optimizer, 5)
    other = mt.LearnedOptimizer(resumed.model, meta, resumed.symmetries, deterministic)
    for forgetful in (False, True):
        resumed.model.load_state_dict(saved["model"])
        kept = {key: value for key, value in saved["optimizer"]["learned"].items() if key != "gauge" or not forgetful}
        other.load_state_dict({**saved["optimizer"], "learned": kept})
        assert torch.equal(train(resumed, other, 5)[-1], expected[-1]) == (not forgetful)


def test_a_gauge_that_moves_the_model_goes_on_too() -> None:
    problem, resumed = case("linear pair").problem(), case("linear pair").problem()
    torch.manual_seed(1)
    teleporter = mt.GaugeTeleporter(LearnedGauge(("GL",), hidden=6)).double()

    def optimizer_of(each: Problem) -> mt.TeleportingOptimizer:
        inner = torch.optim.SGD(each.model.parameters(), lr=1e-3)
        return mt.TeleportingOptimizer(inner, each.model, teleporter, each.symmetries, every=1)

    optimizer, other = optimizer_of(problem), optimizer_of(resumed)
    train(problem, optimizer, 3)  # type: ignore[arg-type]
    saved = through_a_file({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(problem, optimizer, 3)  # type: ignore[arg-type]
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert torch.equal(train(resumed, other, 3)[-1], expected[-1])  # type: ignore[arg-type]


def test_a_step_is_taken_back_to_the_point_that_was_saved() -> None:
    problem = case("linear pair").problem()
    meta = meta_of("lr+tele")
    optimizer = mt.LearnedOptimizer(problem.model, meta, problem.symmetries)
    train(problem, optimizer, 3)
    saved = through_a_file(optimizer.state_dict())
    accepted = saved["learned"]["accepted"]["parameters"]
    with torch.no_grad():
        for each in problem.model.parameters():
            each.add_(10.0)
    other = mt.LearnedOptimizer(problem.model, meta, problem.symmetries)
    other.load_state_dict(saved)
    train(problem, other, 1)
    assert other.last_step is not None
    assert not bool(other.last_step.accepted)
    assert other.meta_state is not None
    assert other.meta_state.accepted is not None
    for name, value in other.meta_state.accepted.parameters.items():
        assert torch.equal(value, accepted[name])


def test_a_stack_goes_on_too() -> None:
    stacked, batch = case("linear pair").stack()
    meta = meta_of("lr+tele")
    optimizer = StackOptimizer(stacked, meta)
    for _ in range(3):
        optimizer.step(lambda: stacked(batch, probe=True))
    kept = {name: value.clone() for name, value in stacked.tensors().items()}
    saved = through_a_file(optimizer.state_dict())
    optimizer.step(lambda: stacked(batch, probe=True))
    expected = optimizer.step(lambda: stacked(batch, probe=True))
    stacked.load(kept)
    other = StackOptimizer(stacked, meta)
    other.load_state_dict(saved)
    other.step(lambda: stacked(batch, probe=True))
    assert torch.equal(other.step(lambda: stacked(batch, probe=True)), expected)


def test_a_state_of_another_shape_is_refused() -> None:
    problem = case("linear pair").problem()
    optimizer = mt.LearnedOptimizer(problem.model, meta_of("lr+tele"), problem.symmetries)
    train(problem, optimizer, 1)
    saved = optimizer.state_dict()
    saved["learned"]["rule"]["velocity"] = {}
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="the saved entry 'learned' does not fit this model"):
        train(problem, optimizer, 1)
