"""What the tests of teleports between steps share: optimizers, training loops, and what they compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_cases import Problem
from torch import Tensor, nn

import metateleport as mt
from metateleport.optim import TeleportingOptimizer
from metateleport.point import Point
from metateleport.teleporters import TrustRegion

INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=3e-4, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=5),
}
PROBLEMS = ("linear pair", "rescaling", "2022 form")
TELEPORTERS: dict[str, Callable[[], mt.Teleporter]] = {
    "random": lambda: mt.RandomTeleporter(size=0.3, seed=0),
    "gradient-ascent": lambda: mt.GradientAscentTeleporter(steps=3, step_size=0.02, cap=0.3),
}

each_problem = pytest.mark.parametrize("name", PROBLEMS)


class Pushing(mt.Teleporter):
    """The generator that it is given, on every symmetry."""

    name = "pushing"

    def __init__(self, generator: Tensor, **region: Any) -> None:
        super().__init__(TrustRegion(**region))
        self.given = generator

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        return self.given, state


def wrap(problem: Problem, inner: Any = "sgd", teleporter: Any = None, **keywords: Any) -> TeleportingOptimizer:
    optimizer = INNER[inner](problem.model.parameters()) if isinstance(inner, str) else inner
    teleporter = mt.RandomTeleporter(size=0.5, seed=0) if teleporter is None else teleporter
    keywords.setdefault("symmetries", problem.symmetries)
    return TeleportingOptimizer(optimizer, problem.model, teleporter, **keywords)


def closure_of(problem: Problem, optimizer: Any, calls: list[float] | None = None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(problem.model(*problem.inputs))
        loss.backward()
        if calls is not None:
            calls.append(float(loss.detach()))
        return loss

    return closure


def backward(problem: Problem, optimizer: Any, factor: float = 1.0, inputs: tuple[Tensor, ...] | None = None) -> None:
    optimizer.zero_grad()
    (factor * problem.loss_of(problem.model(*(inputs or problem.inputs)))).backward()


def train(problem: Problem, optimizer: Any, steps: int, closure: bool = True) -> list[Tensor]:
    """The parameters after each step."""
    trajectory = []
    for _ in range(steps):
        if closure:
            optimizer.step(closure_of(problem, optimizer))
        else:
            backward(problem, optimizer)
            optimizer.step()
        trajectory.append(torch.cat([p.detach().flatten() for p in problem.model.parameters()]))
    return trajectory


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.detach().clone() for name, value in model.named_parameters() if value.grad is not None}


def fresh_gradients(problem: Problem) -> dict[str, Tensor]:
    loss = problem.loss_of(problem.model(*problem.inputs))
    named = dict(problem.model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def loss_at(problem: Problem) -> float:
    return float(problem.loss_of(problem.outputs()))


def everything(problem: Problem, optimizer: Any) -> dict[str, Tensor]:
    """Weights, gradients, buffers and all tensors of the state, copied."""
    kept = {name: value.detach().clone() for name, value in problem.model.state_dict().items()}
    kept |= {f"{name}.grad": value for name, value in gradients(problem.model).items()}
    for name, parameter in problem.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                kept[f"{name}.{key}"] = value.clone()
    return kept


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def frozen_steps(problem: Problem, momentum: float = 0.0) -> torch.optim.Optimizer:
    """An optimizer whose steps move nothing, so that only the teleport is seen."""
    return torch.optim.SGD(problem.model.parameters(), lr=0.0, momentum=momentum)


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
