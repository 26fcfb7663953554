"""Secant pairs around a step: the secant equation, Newton on quadratics, and what is not used."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.learned.secants import Secant, secant_between, with_secants

TASKS, SIZE = 2, 6


def quadratics() -> Tensor:
    source = torch.Generator().manual_seed(0)
    factor = torch.randn(TASKS, SIZE, SIZE, generator=source, dtype=torch.float64)
    return factor @ factor.mT + 0.5 * torch.eye(SIZE, dtype=torch.float64)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def pairs(hessian: Tensor, count: int) -> list[Secant]:
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        step = torch.randn(TASKS, SIZE, generator=source, dtype=torch.float64)
        start = torch.zeros_like(step)
        before, after = ({"w": start}, {"w": start}), ({"w": step}, {"w": times(hessian, step)})
        found.append(secant_between(before, after, torch.ones(TASKS, dtype=torch.bool)))
    return found


def identity(direction: dict[str, Tensor]) -> dict[str, Tensor]:
    return direction


def test_the_last_pair_is_answered_exactly() -> None:
    found = pairs(quadratics(), 4)
    assert torch.allclose(with_secants(found, found[-1].change, identity)["w"], found[-1].step["w"])


def test_steps_with_exact_line_search_end_on_a_quadratic() -> None:
    """Limited-memory BFGS with enough pairs is there after as many steps as there are dimensions."""
    hessian = quadratics()
    weights = torch.ones(TASKS, SIZE, dtype=torch.float64)
    found: list[Secant] = []
    for _ in range(SIZE):
        gradient = times(hessian, weights)
        change = with_secants(found, {"w": gradient}, identity)["w"]
        length = (gradient * change).sum(-1) / (change * times(hessian, change)).sum(-1)
        moved = weights - length.unsqueeze(-1) * change
        before, after = ({"w": weights}, {"w": gradient}), ({"w": moved}, {"w": times(hessian, moved)})
        found.append(secant_between(before, after, torch.ones(TASKS, dtype=torch.bool)))
        weights = moved
    assert float(weights.norm()) < 1e-8


def test_what_was_taken_back_or_does_not_bend_upwards_is_not_used() -> None:
    hessian = quadratics()
    start = torch.zeros(TASKS, SIZE, dtype=torch.float64)
    step = torch.ones_like(start)
    after = ({"w": step}, {"w": times(hessian, step)})
    taken_back = secant_between(({"w": start}, {"w": start}), after, torch.tensor([True, False]))
    assert float(taken_back.weight[0]) > 0
    assert float(taken_back.weight[1]) == 0
    downwards = secant_between(({"w": start}, {"w": start}), ({"w": step}, {"w": -step}), torch.ones(TASKS).bool())
    assert not bool(downwards.weight.any())
    direction = {"w": torch.ones(TASKS, SIZE, dtype=torch.float64)}
    assert torch.equal(with_secants([downwards], direction, identity)["w"], direction["w"])


def test_where_nothing_is_finite_nothing_is_used() -> None:
    bad = {"w": torch.full((TASKS, SIZE), float("nan"), dtype=torch.float64)}
    good = {"w": torch.zeros(TASKS, SIZE, dtype=torch.float64)}
    pair = secant_between((good, good), (bad, bad), torch.ones(TASKS, dtype=torch.bool))
    assert not bool(pair.weight.any())
