"""Every family of the gallery: equal seeds, stacks beside single models, symmetries, settings that cannot work."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gallery_cases import TASKS, close, label, load, tensors
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import rows
from metateleport.families import SPLITS, FamilyError, task_seed

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
    ("cnn_digits", {}),
    ("cnn_digits", {"channels": 3, "depth": 3, "activation": "tanh", "samples": 40, "batch": None}),
    ("tabular", {}),
    ("tabular", {"table": "wine", "depth": 4, "slope": 0.0, "batch": None}),
    ("tabular", {"table": "diabetes", "hidden": 5, "share": 0.5}),
    ("bags", {}),
    ("bags", {"width": 5, "depth": 0, "classes": 3, "samples": 40, "batch": 9}),
    ("quadratic", {}),
    ("quadratic", {"dimension": 3, "condition": 1e4}),
    ("matrix_factorisation", {"width": 6, "rank": 2, "batch": 20}),
    ("matrix_factorisation", {"width": 4, "rank": 4, "condition": 1e3, "batch": None, "noise": 0.1}),
    ("lora_digits", {"width": 96, "samples": 100, "batch": 20}),
    ("lora_text", {"rank": 2, "samples": 12, "batch": 3, "targets": "query-value", "scale": 3.0}),
    (
        "lora_digits",
        {"width": 96, "rank": 2, "classes": 4, "samples": 40, "batch": 9, "scale": 10.0},
    ),
]
# Whatever else is in the gallery is met at its defaults; Omniglot's data come with no package, and MiniLM is large.
ELSEWHERE = {"fewshot_omniglot", "lora_sentences"}
SETTINGS += [
    (path.stem, {})
    for path in sorted(TASKS.glob("[!_]*.py"))
    if path.stem not in {name for name, _ in SETTINGS} | ELSEWHERE
]


gallery = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=label)


def same(one: mt.Task, other: mt.Task) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


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
            if value.requires_grad:
                value.copy_(parameters[key])
                value.grad = None
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(key: str) -> Any:
        def caught(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
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
        named = stack.tasks[0].model.named_parameters()
        assert set(point.gradients) == {key for key, value in named if value.requires_grad}
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
    noise = torch.Generator().manual_seed(0)
    # On a factor that starts at zero, as an adapter's does, any action looks right.
    parameters = {
        key: value if bool(value.any()) else 0.1 * torch.randn(value.shape, generator=noise, dtype=value.dtype)
        for key, value in stack.tensors().items()
    }
    start = stack.point_at(parameters, batch)
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
        ("cnn_digits", {"channels": 0}, "channels=0"),
        ("cnn_digits", {"depth": 0}, "depth=0"),
        ("cnn_digits", {"batch": 1}, "batch=1"),
        ("cnn_digits", {"activation": "sigmoid"}, "one of relu, gelu, silu, tanh"),
        ("tabular", {"table": "iris"}, "one of breast_cancer, wine, diabetes"),
        ("tabular", {"hidden": 0}, "hidden=0"),
        ("tabular", {"depth": 1}, "depth=1"),
        ("tabular", {"share": 0.0}, "share"),
        ("tabular", {"batch": 0}, "batch=0"),
        ("tabular", {"slope": 2.0}, "slope"),
        ("tabular", {"scale": 0.0}, "positive factor"),
        ("bags", {"width": 0}, "width=0"),
        ("bags", {"depth": -1}, "depth=-1"),
        ("bags", {"samples": 401}, "between 5 and 400"),
        ("bottleneck_digits", {"heads": 3}, "multiple of heads=3"),
        ("bottleneck_digits", {"rank": 0}, "rank=0"),
        ("bottleneck_digits", {"hidden": 0}, "hidden=0"),
        ("bottleneck_digits", {"slope": 2.0}, "slope"),
        ("bottleneck_digits", {"classes": 10}, "between 2 and 9"),
        ("lora_digits", {"rank": 0}, "rank=0"),
        ("lora_digits", {"depth": 1}, "depth=1"),
        ("lora_digits", {"classes": 11}, "between 2 and 10"),
        ("lora_digits", {"classes": 3}, "between 3 and 600"),
        ("lora_digits", {"batch": 2001}, "between 1 and samples=2000"),
        ("lora_digits", {"turn": 181.0}, "between 0 and 180"),
        ("lora_digits", {"scale": 0.0}, "positive factor"),
        ("lora_digits", {"split": 0.5}, "condition number"),
        ("lora_digits", {"activation": "sigmoid"}, "one of relu, leaky_relu, gelu, tanh"),
        ("lora_text", {"rank": 0}, "rank=0"),
        ("lora_text", {"batch": 2049}, "between 1 and samples=2048"),
        ("lora_text", {"split": 0.0}, "condition number"),
        ("lora_text", {"targets": "mlp"}, "one of all, attention, query-value"),
        ("lora_sentences", {"rank": 0}, "rank=0"),
        ("lora_sentences", {"classes": 1}, "classes=1"),
        ("lora_sentences", {"batch": 600}, "between 1 and 528"),
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
