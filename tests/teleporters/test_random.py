"""Random elements: their size and their seed."""

from __future__ import annotations

import math

import pytest
import torch
from symmetry_cases import case

import metateleport as mt


def test_random_elements_have_their_size_and_come_from_their_seed() -> None:
    weights = []
    for seed in (0, 0, 1):
        problem = case("chain of linear pairs").problem()
        teleporter = mt.RandomTeleporter(size=0.3, seed=seed)
        report = mt.teleport(problem.model, teleporter, problem.inputs, None, problem.symmetries)
        assert report.sizes == pytest.approx((0.3, 0.3), rel=1e-12)
        assert report.size == pytest.approx(0.3 * math.sqrt(2))
        again = mt.teleport(problem.model, teleporter, problem.inputs, None, problem.symmetries)
        assert again.accepted
        weights.append(problem.model[0].weight.detach().clone())  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    source = torch.Generator().manual_seed(0)
    problem = case("chain of linear pairs").problem()
    for _ in range(2):
        mt.teleport(problem.model, mt.RandomTeleporter(0.3, generator=source), problem.inputs, None, problem.symmetries)
    assert torch.equal(problem.model[0].weight, weights[0])  # type: ignore[index]


def test_a_seeded_teleport_leaves_the_global_random_state_alone() -> None:
    problem = case("rescaling").problem()
    before = torch.get_rng_state()
    mt.teleport(problem.model, mt.RandomTeleporter(seed=0), problem.inputs, None, problem.symmetries)
    assert torch.equal(torch.get_rng_state(), before)
