"""A learned optimizer that goes on from its state dict takes the same steps."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from symmetry_cases import Problem, case
from torch import Tensor

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.learned import MODES, GaugeTeleporter, LearnedTeleporter, MetaOptimizer
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.refresh import Refresh


def meta_of(mode: str, network: str = "equivariant", problem: Problem | None = None) -> MetaOptimizer:
    """A meta-optimizer with a teleport large enough to be seen."""
    torch.manual_seed(1)
    shapes: tuple[Any, ...] = ()
    if problem is not None and network == "flat":
        stack = TaskStack([problem.task])
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in stack.tensors().items())
    config = shape_of(mode=mode, hidden=6, shapes=shapes, base="momentum")
    meta = MetaOptimizer(config)
    if isinstance(meta.teleporter, LearnedTeleporter):
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
    optimizer = mt.LearnedOptimizer(problem.model, meta, problem.symmetries, deterministic=True)
    train(problem, optimizer, 5)
    saved = through_a_file({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(problem, optimizer, 5)
    resumed.model.load_state_dict(saved["model"])
    other = mt.LearnedOptimizer(resumed.model, meta, resumed.symmetries, deterministic=True)
    other.load_state_dict(saved["optimizer"])
    # Saved again before it was used, nothing is lost.
    other.load_state_dict(through_a_file(other.state_dict()))
    for mine, theirs in zip(train(resumed, other, 5), expected, strict=True):
        assert torch.equal(mine, theirs)
    # Forgetting shows.
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict({**saved["optimizer"], "state": {}})
    assert not torch.equal(train(resumed, other, 5)[-1], expected[-1])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("name", "smallest"), [("linear pair", 64), ("linear pair", 2), ("rescaling", 64)])
def test_its_gauges_go_on_too(name: str, smallest: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Held for long, so that the file is written while they are.
    held = functools.partial(Refresh, smallest, little=float("inf"), much=float("inf"))
    monkeypatch.setattr("metateleport.optim.learned.Refresh", held)
    problem, resumed = case(name).problem(), case(name).problem()
    torch.manual_seed(1)
    meta = MetaOptimizer(shape_of(stays=False, gauge="exact", hidden=6)).double()
    optimizer = mt.LearnedOptimizer(problem.model, meta, problem.symmetries, deterministic=deterministic)
    train(problem, optimizer, 5)
    saved = through_a_file({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(problem, optimizer, 5)
    other = mt.LearnedOptimizer(resumed.model, meta, resumed.symmetries, deterministic=deterministic)
    for forgetful in (False, True):
        resumed.model.load_state_dict(saved["model"])
        kept = {
            index: {key: value for key, value in entries.items() if "/gauge/" not in key or not forgetful}
            for index, entries in saved["optimizer"]["state"].items()
        }
        other.load_state_dict({**saved["optimizer"], "state": kept})
        assert torch.equal(train(resumed, other, 5)[-1], expected[-1]) == (not forgetful)


def test_a_gauge_that_moves_the_model_goes_on_too() -> None:
    problem, resumed = case("linear pair").problem(), case("linear pair").problem()
    torch.manual_seed(1)
    teleporter = GaugeTeleporter(LearnedGauge(("GL",), hidden=6)).double()

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
    optimizer = mt.LearnedOptimizer(problem.model, meta, problem.symmetries, deterministic=True)
    train(problem, optimizer, 3)
    saved = through_a_file(optimizer.state_dict())
    place = "learned/accepted/parameters/"
    own = saved["state"][0]
    names = {str(number): name for number, (name, _) in enumerate(problem.model.named_parameters())}
    accepted = {names[key.removeprefix(place)]: value for key, value in own.items() if key.startswith(place)}
    with torch.no_grad():
        for each in problem.model.parameters():
            each.add_(10.0)
    other = mt.LearnedOptimizer(problem.model, meta, problem.symmetries, deterministic=True)
    other.load_state_dict(saved)
    train(problem, other, 1)
    assert other.last_step is not None
    assert not bool(other.last_step.accepted)
    assert other.loop.state is not None
    assert other.loop.state.accepted is not None
    for name, value in other.loop.state.accepted.parameters.items():
        assert torch.equal(value, accepted[name])


def test_a_state_of_another_shape_is_refused() -> None:
    problem = case("linear pair").problem()
    optimizer = mt.LearnedOptimizer(problem.model, meta_of("lr+tele"), problem.symmetries)
    train(problem, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["learned/progress/last"] = torch.ones(3)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"'progress/last' has shape \(3,\).*same model, symmetries and checkpoint"):
        train(problem, optimizer, 1)
