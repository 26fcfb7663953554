"""`matrix_factorisation`: rank, condition, noise and measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gallery_cases import close, fills, load


@pytest.mark.parametrize(("rank", "condition"), [(1, 1.0), (3, 10.0), (5, 1e4)])
def test_matrices_have_the_rank_and_the_condition_asked_for(rank: int, condition: float) -> None:
    task = load("matrix_factorisation", {"width": 12, "rank": rank, "condition": condition, "batch": 50}).task(0)
    assert task.measure is not None
    (sought,) = task.measure.data
    values = torch.linalg.svdvals(sought)
    close(values[:rank], 3 * torch.logspace(0, -float(np.log10(condition)), rank, dtype=torch.float64), 1e-9)
    assert bool((values[rank:] < 1e-13).all())
    first, second = task.model.first.weight, task.model.second.weight
    assert first.shape == (rank, 12)
    assert second.shape == (12, rank)
    assert task.inputs[0].shape == (8 * 12 * rank, 12, 12)
    close(task.targets[0], torch.einsum("sij,ij->s", task.inputs[0], sought))
    close(task.model(task.inputs[0]).detach(), torch.einsum("sij,ij->s", task.inputs[0], (second @ first).detach()))


def test_matrix_factorisation_is_judged_by_the_matrix_and_not_by_the_measurements() -> None:
    stack = load("matrix_factorisation", {"width": 6, "rank": 2, "batch": 20, "noise": 0.1}).stack([0, 1])
    tasks = [task.measure for task in stack.tasks]
    sought = torch.stack([each.data[0] for each in tasks if each is not None])
    left, values, right = torch.linalg.svd(sought)
    root = values[:, :2].sqrt()
    exact = {"first.weight": root.unsqueeze(-1) * right[:, :2], "second.weight": left[:, :, :2] * root.unsqueeze(-2)}
    assert bool((stack.measured(exact) < 1e-25).all())
    assert bool((stack.losses_at(exact, stack.full) > 1e-3).all()), "the noise is in the loss"
    half = {"first.weight": exact["first.weight"] / 2, "second.weight": exact["second.weight"]}
    assert stack.measured(half).tolist() == pytest.approx([0.25, 0.25])


def test_matrix_factorisation_noise_is_relative_to_the_measurements() -> None:
    settings = {"width": 10, "rank": 5}
    clean = load("matrix_factorisation", settings).task(0)
    noisy = load("matrix_factorisation", {**settings, "noise": 0.3}).task(0)
    noise = noisy.targets[0] - clean.targets[0]
    assert float(noise.std() / clean.targets[0].std()) == pytest.approx(0.3, rel=0.2)


def test_matrix_factorisation_varies_in_training() -> None:
    family = load("matrix_factorisation")
    drawn = [family.augmented(index, 0) for index in range(60)]
    assert {each.rank for each in drawn} == set(range(2, 8))
    assert {12, 24} <= {each.width for each in drawn} <= set(range(12, 25))
    assert max(each.condition for each in drawn) > 100
    assert 20 < sum(each.noise == 0 for each in drawn) < 40
    fills([math.log(each.noise) for each in drawn if each.noise], math.log(0.01), math.log(0.3))
    assert all(each.batch == 100 for each in drawn)
    assert family.augmented(3, 1) == family.augmented(3, 1)
    small = load("matrix_factorisation", {"width": 3, "rank": 2, "batch": 48})
    assert all(each.batch <= each.measurements for each in (small.augmented(index, 0) for index in range(40)))


def test_wide_training_goes_beyond_and_other_settings_stay() -> None:
    family = load("matrix_factorisation", {"wide": True})
    drawn = [family.augmented(index, 0) for index in range(60)]
    assert max(each.width for each in drawn) > 24
    assert max(each.rank for each in drawn) > 7
    assert max(each.condition for each in drawn) > 3000
    assert family.sample(3).training[0][0].equal(load("matrix_factorisation", {}).sample(3).training[0][0])
