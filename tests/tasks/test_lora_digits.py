"""`lora_digits`: adapters of pre-trained backbones; what training and held-out tasks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery_cases import TASKS, close, fills, load

from metateleport.evaluation import RIVALS
from metateleport.families import SPLITS, Task
from metateleport.files import run_file

SMALL: dict[str, Any] = {"width": 8, "depth": 2, "samples": 60, "batch": 20}


def base(task: Task) -> tuple[float, ...]:
    return tuple(task.model.state_dict()["0.base_layer.weight"].flatten()[:5].tolist())


@pytest.mark.slow(seconds=3)
def test_splits_share_no_backbone() -> None:
    family = load("lora_digits", SMALL)
    backbones = {split: {base(family.task(index, split)) for index in range(12)} for split in SPLITS}
    assert {split: len(found) for split, found in backbones.items()} == {"train": 2, "validation": 1, "held-out": 2}
    assert len(set.union(*backbones.values())) == 5


def test_held_out_tasks_train_on_images_of_their_own() -> None:
    family = load("lora_digits", {**SMALL, "turn": 0.0, "samples": 2000})
    images = {
        split: {tuple(image.tolist()) for image in family.task(0, split).inputs[0]} for split in ("train", "held-out")
    }
    assert len(images["train"]) > 1990
    assert not images["train"] & images["held-out"]


def test_the_shipped_backbones_know_upright_digits() -> None:
    family = load("lora_digits", {"turn": 0.0})
    module = run_file(TASKS / "lora_digits.py", "test_")
    right = torch.arange(10).repeat_interleave(100)
    for number in range(5):
        weights = module.SHIPPED.weights(f"relu-96-4-{number}")
        model = module.perceptron(96, 4, "relu", torch.Generator())
        model.load_state_dict(weights)
        assert (model(module.images().held_out.flatten(0, 1)).argmax(-1) == right).float().mean() > 0.9
    assert base(family.task(0)) in {
        tuple(module.SHIPPED.weights(f"relu-96-4-{number}")["0.weight"].flatten()[:5].tolist()) for number in (0, 1)
    }


def test_an_image_is_turned_by_its_angle() -> None:
    module = run_file(TASKS / "lora_digits.py", "test_")
    image = torch.arange(196, dtype=torch.float64).reshape(1, 14, 14)
    close(module.turned(image.flatten(1), 0.0), image.flatten(1), 1e-9)
    close(module.turned(image.flatten(1), 90.0), image.rot90(1, (1, 2)).flatten(1), 1e-9)
    close(module.turned(image.flatten(1), 180.0), image.flatten(1).flip(1), 1e-9)


def test_a_split_start_keeps_the_loss() -> None:
    usual, split = (load("lora_digits", {**SMALL, **own}).stack([0, 1]) for own in ({}, {"scale": 30.0, "split": 9.0}))
    close(usual.losses_at(usual.tensors(), usual.full), split.losses_at(split.tensors(), split.full))
    ratio = split.tensors()["0.lora_A.weight"].norm() / usual.tensors()["0.lora_A.weight"].norm()
    assert 10 < ratio < 100


def test_meta_training_meets_many_shapes() -> None:
    drawn: list[Any] = [load("lora_digits").augmented(index, 0) for index in range(300)]
    fills([float(each.rank) ** 0.5 for each in drawn], 1.0, 4.0)
    assert {each.width for each in drawn} == {48, 72, 96}
    assert {each.depth for each in drawn} == {3, 4, 5}
    assert {each.activation for each in drawn} == {"relu", "leaky_relu", "gelu", "tanh"}
    assert {each.classes for each in drawn} == set(range(5, 11))
    scales = torch.tensor([each.scale for each in drawn if each.scale != 1]).log10()
    fills(scales.tolist(), -2.0, 2.0)
    assert 0.2 < sum(each.scale == each.split == 1 for each in drawn) / len(drawn) < 0.45


@pytest.mark.parametrize("classes", [3, 10])
def test_labels_are_permuted(classes: int) -> None:
    family = load("lora_digits", {**SMALL, "classes": classes, "samples": 60})
    sets = [tuple(family.task(index).targets[0].unique().tolist()) for index in range(6)]
    assert all(len(each) == classes for each in sets)
    assert len(set(sets)) > 1 or classes == 10


@pytest.mark.slow(seconds=2)
def test_the_step_in_a_gauge_is_the_same_however_the_product_is_split() -> None:
    """Muon without gauges is not: it sees the factors."""
    losses: dict[str, list[Any]] = {"gauged": [], "gauged-shampoo": [], "muon": []}
    for own in ({}, {"scale": 0.05, "split": 20.0}):
        stack = load("lora_digits", {**SMALL, "rank": 3, **own}).stack([0, 1], dtype=torch.float64)
        for name, found in losses.items():
            found.append(RIVALS[name].make(lr=0.01).run(stack, 40).loss[:, -1])
    apart = {name: float(abs(one / other - 1).max()) for name, (one, other) in losses.items()}
    assert apart["gauged"] < 1e-8
    assert apart["gauged-shampoo"] < 1e-8
    assert apart["muon"] > 0.01
