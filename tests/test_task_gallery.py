"""The families of the gallery: equal seeds, stacks beside single models, symmetries, and what each promises."""

from __future__ import annotations

import itertools
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
from metateleport.families import SPLITS, task_seed

TASKS = Path(__file__).resolve().parents[1] / "tasks"
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("leaky_mlp", {"width": 6}),
    ("leaky_mlp", {"width": 6, "distribution": "normal", "depth": 3, "samples": 5}),
    ("leaky_mlp", {"width": 6, "distribution": "normal", "samples": 9}),
    ("leaky_mlp", {"width": 6, "activation": "tanh", "distribution": "normal", "samples": 12, "batch": 4}),
    ("leaky_mlp", {"width": 6, "activation": "relu", "distribution": "normal", "samples": 20, "batch": 10}),
    ("leaky_mlp", {"width": 6, "activation": "identity", "depth": 4, "labels": "teacher", "noise": 0.1}),
    ("digits", {}),
    ("digits", {"hidden": 7, "depth": 4, "classes": 3, "samples": 50, "batch": None, "slope": 0.0}),
    ("fewshot_digits", {}),
    ("fewshot_digits", {"ways": 2, "shots": 1, "queries": 3, "hidden": 5, "bottleneck": None}),
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
    return [*task.model.state_dict().values(), *task.inputs, *task.targets, *held_out[0], *held_out[1], *sought]


def same(one: mt.Task, other: mt.Task) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


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
            for key, value in stack.model.tensors().items()
        }
        point = stack.model.point_at(parameters, stack.batch(step))
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
                close(activation[place], alone["inputs"][key])
                # A scalar output is one sample of one feature.
                close(point.cotangents[key][place], torch.atleast_2d(alone["cotangents"][key]))


@gallery
def test_symmetries_keep_the_loss_and_carry_gradients(name: str, settings: dict[str, Any]) -> None:
    stack = load(name, settings).stack([0, 1, 2], dtype=torch.float64)
    batch = stack.batch(0)
    start = stack.model.point_at(stack.model.tensors(), batch)
    assert start.loss is not None
    for number, symmetry in enumerate(stack.symmetries):
        # Pairs with as many samples as units solve with square random matrices: what they lose is their condition.
        tolerance = 1e-9 if symmetry.exactness == "exact" else 1e-5
        element = symmetry.group.random(3, size=0.5, seed=number, dtype=torch.float64)
        moved = symmetry.act(element, start)
        there = stack.model.point_at(moved.parameters, batch)
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
        ({}, mt.BatchPair2022, 1),
        ({"depth": 4}, mt.BatchPair2022, 3),
        ({"samples": 21}, mt.Rescaling, 1),
        ({"samples": 100, "batch": 20}, mt.BatchPair2022, 1),
        ({"samples": 100, "batch": 21, "activation": "relu"}, mt.Rescaling, 1),
        ({"activation": "relu"}, mt.BatchPair2024, 1),
        ({"activation": "tanh", "samples": 10}, mt.BatchPair2024, 1),
        ({"activation": "tanh", "samples": 21}, mt.BatchPair2024, 0),
        ({"activation": "identity", "samples": 100, "depth": 3}, mt.LinearPair, 2),
    ],
    ids=label,
)
def test_leaky_mlp_names_the_symmetries_that_hold(
    settings: dict[str, Any], kind: type[mt.Symmetry], count: int
) -> None:
    assert [type(each) for each in load("leaky_mlp", settings).task(0).symmetries] == [kind] * count


# Real digits


@pytest.fixture(scope="module")
def known() -> dict[bytes, tuple[int, int]]:
    """Number and digit of every image in scikit-learn's own order, by its pixels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return {
        image.astype(np.uint8).tobytes(): (number, int(digit))
        for number, (image, digit) in enumerate(zip(bunch.data, bunch.target, strict=True))
    }


def recognised(batch: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], known: dict[bytes, tuple[int, int]]) -> list[Any]:
    """Number, digit and label of each image of a batch, found again by its pixels."""
    values = batch[0][0].double()
    levels = ((values - values.min()) / (values.max() - values.min()) * 16).round().to(torch.uint8).numpy()
    labels = batch[1][0].tolist()
    return [(*known[level.tobytes()], label) for level, label in zip(levels, labels, strict=True)]


def test_digits_share_out_classes_and_images(known: dict[bytes, tuple[int, int]]) -> None:
    family = load("digits", {"classes": 3, "samples": 200})
    trained: set[int] = set()
    held_out: set[int] = set()
    subsets: dict[str, set[tuple[int, ...]]] = {split: set() for split in SPLITS}
    for split, index in itertools.product(SPLITS, range(40)):
        task = family.task(index, split)
        assert task.held_out is not None
        seen, unseen = recognised((task.inputs, task.targets), known), recognised(task.held_out, known)
        trained |= {number for number, _, _ in seen}
        held_out |= {number for number, _, _ in unseen}
        pairs = {(digit, label) for _, digit, label in seen + unseen}
        assert len(pairs) == 3, "each digit has one label, the same in training and held-out images"
        assert {label for _, label in pairs} == {0, 1, 2}
        assert len({number for number, _, _ in seen}) == 200, "no image twice"
        assert len(unseen) == 3 * 34
        subsets[split].add(tuple(sorted(digit for digit, _ in pairs)))
    assert not trained & held_out
    assert len(trained) == 1400
    assert len(held_out) == 340
    for one, other in itertools.combinations(SPLITS, 2):
        assert not subsets[one] & subsets[other]
    assert all(len(each) > 10 for each in subsets.values())


@pytest.mark.parametrize("classes", range(2, 10))
def test_digits_subsets_partition_all_subsets(classes: int) -> None:
    module = sys.modules[type(load("digits")).__module__]
    parts = [module.subsets(classes, split) for split in SPLITS]
    every = [each for part in parts for each in part]
    assert sorted(every) == list(itertools.combinations(range(10), classes))
    assert all(parts)
    # No digit is missing from training altogether.
    assert {digit for each in parts[0] for digit in each} == set(range(10))


def test_digits_have_the_sizes_and_the_scale_asked_for() -> None:
    family = load("digits", {"hidden": 9, "depth": 3, "classes": 4, "samples": 100, "batch": 25, "slope": 0.2})
    task = family.task(0)
    shapes = [tuple(value.shape) for value in task.model.parameters()]
    assert shapes == [(9, 64), (9,), (9, 9), (9,), (4, 9), (4,)]
    assert task.model[1].negative_slope == 0.2
    assert task.inputs[0].shape == (100, 64)
    assert task.batch(0)[0][0].shape == (25, 64)
    assert load("digits").task(0).batch(0)[0][0].shape == (64, 64)
    assert load("digits", {"batch": "all"}).task(0).batch(0)[0][0].shape == (640, 64)
    assert [type(each) for each in task.symmetries] == [mt.Rescaling] * 2
    training = torch.cat([load("digits").task(index).inputs[0] for index in range(20)])
    assert abs(float(training.mean())) < 0.05
    assert abs(float(training.std()) - 1) < 0.05


def test_digits_start_like_torchs_own_layers() -> None:
    task = load("digits", {"hidden": 1000}).task(0)
    like = nn.Sequential(nn.Linear(64, 1000), nn.LeakyReLU(), nn.Linear(1000, 5))
    for mine, theirs in zip(task.model.parameters(), like.parameters(), strict=True):
        bound = float(theirs.abs().max())
        assert float(mine.abs().max()) == pytest.approx(bound, rel=0.5 if mine.numel() < 10 else 0.05)


def test_digits_loss_and_score() -> None:
    task = load("digits").task(0)
    assert task.score is not None
    assert float(task.loss(torch.zeros(7, 5), torch.arange(7) % 5)) == pytest.approx(np.log(5))
    outputs = torch.tensor([[[3.0, 1], [0, 1]], [[0, 1], [0, 1]]])
    assert float(task.score(outputs[0], torch.tensor([0, 0]))) == 0.5
    assert task.score(outputs, torch.tensor([[0, 1], [0, 0]])).tolist() == [1, 0]


def test_digits_can_be_learned() -> None:
    stack = load("digits").stack([0, 1], "held-out")
    optimizer = torch.optim.SGD(stack.model.parameters(), lr=0.2)
    for step in range(60):
        optimizer.zero_grad()
        stack.model(stack.batch(step)).sum().backward()
        optimizer.step()
    assert stack.held_out is not None
    assert stack.score is not None
    outputs = stack.model.outputs(stack.model.tensors(), stack.held_out[0])
    assert bool((stack.score(outputs, *stack.held_out[1]) > 0.9).all())


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(mt.FamilyError, match=r"pip install 'metateleport\[tasks\]'"):
        load("digits").task(0)


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
    assert bool((stack.model.losses_at(exact, stack.full) > 1e-3).all()), "the noise is in the loss"
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
    with pytest.raises(mt.FamilyError, match=f"{name}.*{message}"):
        load(name, settings)
