"""`leaky_mlp`: the source paper's regression, and a teacher network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery_cases import close, fills, label, load, tensors
from torch import nn

import metateleport as mt
from metateleport.symmetries import BatchPair2022, BatchPair2024


def test_leaky_mlp_has_the_sizes_asked_for() -> None:
    task = load("leaky_mlp", {"width": 7, "depth": 4, "samples": 11, "batch": 3}).task(0)
    assert [tuple(value.shape) for value in task.model.parameters()] == [(7, 7)] * 4
    assert [type(each) for each in task.model] == [nn.Linear, nn.LeakyReLU] * 3 + [nn.Linear]
    assert task.model[1].negative_slope == 0.1
    assert task.inputs[0].shape == task.targets[0].shape == (11, 7)
    assert task.batch(0)[0][0].shape == (3, 7)
    assert load("leaky_mlp", {"width": 9}).task(0).inputs[0].shape == (9, 9)
    assert load("leaky_mlp").settings() == {
        "width": 20,
        "samples": None,
        "depth": 2,
        "activation": "leaky_relu",
        "distribution": "uniform",
        "batch": None,
        "labels": "random",
        "noise": 0.0,
        "mixture": False,
    }


def test_leaky_mlp_has_the_papers_loss() -> None:
    task = load("leaky_mlp", {"width": 5, "distribution": "normal"}).task(0)
    x, y = task.inputs[0].T, task.targets[0].T
    first, second = (value.detach() for value in task.model.parameters())
    hidden = first @ x
    hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
    close(task.loss(task.model(*task.inputs), *task.targets).detach(), (y - second @ hidden).square().sum() / 2)


@pytest.mark.parametrize(("distribution", "mean", "deviation"), [("uniform", 0.5, 12**-0.5), ("normal", 0.0, 1.0)])
def test_leaky_mlp_draws_from_the_distribution(distribution: str, mean: float, deviation: float) -> None:
    task = load("leaky_mlp", {"width": 100, "distribution": distribution}).task(0)
    for value in tensors(task):
        # Five standard errors of 10000 draws.
        assert abs(float(value.mean()) - mean) < 5 * deviation / 100
        assert abs(float(value.std()) - deviation) < 5 * deviation / 100
        assert distribution != "uniform" or (float(value.min()) >= 0 and float(value.max()) <= 1)


def residual(task: mt.Task) -> float:
    """Distance of the targets from the linear functions of the inputs, relative."""
    solution = torch.linalg.lstsq(task.inputs[0], task.targets[0]).solution
    return float((task.inputs[0] @ solution - task.targets[0]).norm() / task.targets[0].norm())


def test_leaky_mlp_teachers_can_be_learned_and_noise_cannot() -> None:
    settings = {"width": 6, "samples": 200, "activation": "identity", "distribution": "normal"}
    teacher = load("leaky_mlp", {**settings, "labels": "teacher"}).task(0)
    assert residual(teacher) < 1e-12
    assert residual(load("leaky_mlp", settings).task(0)) > 0.9
    loss = teacher.loss(teacher.model(*teacher.inputs), *teacher.targets)
    assert float(loss.detach()) > 1, "the teacher is not the student itself"
    noisy = load("leaky_mlp", {**settings, "labels": "teacher", "noise": 0.3}).task(0)
    noise = noisy.targets[0] - teacher.targets[0]
    assert torch.equal(noisy.inputs[0], teacher.inputs[0])
    assert not noisy.targets[0].requires_grad
    assert abs(float(noise.std()) - 0.3) < 5 * 0.3 / (2 * 1200) ** 0.5


@pytest.mark.parametrize(
    ("settings", "kind", "count"),
    [
        ({}, BatchPair2022, 1),
        ({"depth": 4}, BatchPair2022, 3),
        ({"samples": 21}, mt.Rescaling, 1),
        ({"samples": 100, "batch": 20}, BatchPair2022, 1),
        ({"samples": 100, "batch": 21, "activation": "relu"}, mt.Rescaling, 1),
        ({"activation": "relu"}, BatchPair2024, 1),
        ({"activation": "tanh", "samples": 10}, BatchPair2024, 1),
        ({"activation": "tanh", "samples": 21}, BatchPair2024, 0),
        ({"activation": "identity", "samples": 100, "depth": 3}, mt.LinearPair, 2),
    ],
    ids=label,
)
def test_leaky_mlp_names_the_symmetries_that_hold(
    settings: dict[str, Any], kind: type[mt.Symmetry], count: int
) -> None:
    assert [type(each) for each in load("leaky_mlp", settings).task(0).symmetries] == [kind] * count


def test_a_teachers_labels_are_those_of_one_network_and_the_noise_is_relative() -> None:
    settings = {"width": 10, "samples": 2000, "slope": 1.0}
    clean, noisy = (load("teacher", {**settings, "noise": noise}).task(0) for noise in (0.0, 0.3))
    assert clean.held_out is not None
    assert noisy.held_out is not None
    assert residual(clean) < 1e-12, "with a slope of one the teacher is linear"
    solution = torch.linalg.lstsq(clean.inputs[0], clean.targets[0]).solution
    close(noisy.held_out[0][0] @ solution, noisy.held_out[1][0], 1e-10)
    assert clean.held_out[0][0].shape == (500, 10)
    noise = noisy.targets[0] - clean.targets[0]
    assert torch.equal(noisy.inputs[0], clean.inputs[0])
    assert float(noise.std() / clean.targets[0].std()) == pytest.approx(0.3, rel=0.03)
    assert not noisy.targets[0].requires_grad
    assert float(clean.loss(clean.model(*clean.inputs), *clean.targets).detach()) > 1, "the student is another network"


def test_a_teachers_loss_is_of_one_scale_whatever_the_batch() -> None:
    task = load("teacher", {"width": 4, "samples": 40, "batch": 10}).task(0)
    losses = [task.loss(task.model(*inputs), *targets) for inputs, targets in (task.batch(step) for step in range(4))]
    inputs, targets = task.training
    whole = task.loss(task.model(*inputs), *targets).detach()
    close(torch.stack(losses).mean().detach(), whole)
    errors = (task.model(*inputs) - targets[0]).detach().square().sum(-1)
    close(whole, errors.mean() / 2)


def test_teachers_vary_in_training() -> None:
    family = load("teacher")
    drawn = [family.augmented(index, 0) for index in range(80)]
    assert {12, 24} <= {each.width for each in drawn} <= set(range(12, 25))
    assert {each.depth for each in drawn} == {2, 3, 4}
    fills([each.batch for each in drawn], 25, 100)
    fills([each.scale for each in drawn], 1 / 3, 3)
    fills([each.noise for each in drawn], 0, 0.3)
    assert family.augmented(3, 1) == family.augmented(3, 1)
    assert load("teacher", {"batch": None}).augmented(0, 0).batch is None
    tiny = load("teacher", {"width": 1, "samples": 3, "batch": 3, "slope": 1.0})
    assert all(each.batch <= 3 and each.slope <= 1 for each in (tiny.augmented(index, 0) for index in range(40)))
