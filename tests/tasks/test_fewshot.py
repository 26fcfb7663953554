"""The few-shot families: what a task is made of, and that no split meets another."""

from __future__ import annotations

import hashlib
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metateleport as mt
from metateleport.cli import main
from metateleport.families import SPLITS, FamilyError, Split, TaskStack, task_seed
from metateleport.fewshot import Episodes
from metateleport.fewshot.learn2learn import learn2learn

TASKS = Path(__file__).resolve().parents[2] / "tasks"


def load(name: str, **settings: Any) -> mt.TaskFamily:
    return mt.load_family(TASKS / f"{name}.py", settings)


def module_of(family: mt.TaskFamily) -> Any:
    return sys.modules[type(family).__module__]


def images_in(task: mt.Task) -> Tensor:
    assert task.held_out is not None
    return torch.cat((task.inputs[0], task.held_out[0][0]))


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# Episodes


@pytest.mark.slow(seconds=2)
def test_episodes_have_the_classes_and_numbers_asked_for() -> None:
    labels = [index % 7 for index in range(70)]
    episodes = Episodes(labels, lambda indices: indices)
    chosen, targets_of = [], {}
    for seed in range(30):
        support, query = episodes.sample((1, 3, 4, 6), ways=3, shots=2, queries=5, seed=seed)
        assert support[1].tolist() == [0, 0, 1, 1, 2, 2]
        assert query[1].tolist() == [0] * 5 + [1] * 5 + [2] * 5
        indices = torch.cat((support[0], query[0]))
        assert len(indices.unique()) == 21, "no image twice in a task"
        for images, targets in (support, query):
            kinds = torch.tensor([labels[int(index)] for index in images])
            for target in range(3):
                assert len(kinds[targets == target].unique()) == 1
                targets_of.setdefault(int(kinds[targets == target][0]), set()).add(target)
        # One class has one target, in the support and the query alike.
        assert torch.equal(
            *(torch.tensor([labels[int(i)] for i in part[0][::n]]) for part, n in ((support, 2), (query, 5)))
        )
        chosen.append(frozenset(labels[int(index)] for index in indices))
    assert set().union(*chosen) == {1, 3, 4, 6}
    assert len(set(chosen)) == 4
    assert all(targets == {0, 1, 2} for targets in targets_of.values()), "which class gets which target is drawn"


def test_episodes_are_of_their_seed_and_leave_pythons_random_numbers_alone() -> None:
    episodes = Episodes([index % 5 for index in range(50)], lambda indices: indices)
    state = random.getstate()
    first = episodes.sample(range(5), 3, 1, 2, seed=4)
    assert random.getstate() == state
    random.random()
    again = Episodes([index % 5 for index in range(50)], lambda indices: indices).sample(range(5), 3, 1, 2, seed=4)
    other = episodes.sample(range(5), 3, 1, 2, seed=5)
    assert torch.equal(first.support[0], again.support[0])
    assert torch.equal(first.query[0], again.query[0])
    assert not torch.equal(first.query[0], other.query[0])


@pytest.mark.parametrize(
    ("classes", "ways", "shots", "queries", "said"),
    [
        ((0, 1), 3, 1, 1, "no more ways than classes"),
        ((0, 0), 2, 1, 1, "no more ways than classes"),
        ((0, 1), 2, 0, 1, "at least one"),
        ((0, 1), 2, 4, 2, "class 0 has 5 images"),
        ((0, 9), 2, 1, 1, "class 9 has 0 images"),
    ],
)
def test_episodes_that_cannot_be_are_refused(
    classes: tuple[int, ...], ways: int, shots: int, queries: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Episodes([index % 2 for index in range(10)], lambda indices: indices).sample(classes, ways, shots, queries, 0)


# Digits


def test_digits_are_shared_out_between_the_splits() -> None:
    module = module_of(load("fewshot_digits"))
    digits = [digit for split in SPLITS for digit in module.DIGITS[split]]
    assert sorted(digits) == list(range(10))
    classes = [set(module.classes_of(split)) for split in SPLITS]
    assert set.union(*classes) == set(range(20))
    assert sum(map(len, classes)) == 20
    _, labels = module.images()
    assert int(labels.bincount().min()) == module.IMAGES


def turns_of(images: Tensor, side: int) -> set[bytes]:
    square = images.reshape(-1, side, side)
    return rows(torch.cat([torch.rot90(square, turn, (1, 2)).flatten(1) for turn in range(4)]))


def test_no_image_of_digits_is_in_tasks_of_two_splits() -> None:
    family = load("fewshot_digits", shots=5, queries=60)
    met: dict[Split, set[bytes]] = {}
    for split in SPLITS:
        tasks = [family.task(index, split, seed=index % 2) for index in range(12)]
        for task in tasks:
            assert task.held_out is not None
            assert not rows(task.inputs[0]) & rows(task.held_out[0][0]), "what is queried is not adapted to"
        met[split] = turns_of(torch.cat([images_in(task) for task in tasks]), 8)
        assert len(met[split]) > 400
    # Not even in another turn.
    assert not met["train"] & met["validation"]
    assert not (met["train"] | met["validation"]) & met["held-out"]
    seeds = [{task_seed(0, split, index) for index in range(50)} for split in SPLITS]
    assert len(set.union(*seeds)) == 150


def test_a_class_of_digits_is_a_digit_in_one_turn() -> None:
    from sklearn.datasets import load_digits

    module = module_of(load("fewshot_digits"))
    pixels, labels = module.images()
    bunch = load_digits()
    known = bunch.images[np.isin(bunch.target, module.DIGITS["train"])] / 16
    for index in (0, 7, 100):
        expected = (bunch.images[index] / 16 - known.mean()) / known.std(ddof=1)
        for turn in (0, 1):
            np.testing.assert_allclose(
                pixels[2 * index + turn].reshape(8, 8).numpy(), np.rot90(expected, turn), atol=1e-12
            )
            assert int(labels[2 * index + turn]) == 2 * bunch.target[index] + turn


@pytest.mark.parametrize("bottleneck", [8, None])
def test_digit_tasks_have_the_sizes_and_symmetries_asked_for(bottleneck: int | None) -> None:
    family = load("fewshot_digits", ways=3, shots=2, queries=4, hidden=10, bottleneck=bottleneck, slope=0.2)
    task = family.task(0)
    assert task.inputs[0].shape == (6, 64)
    assert task.held_out is not None
    assert task.held_out[0][0].shape == (12, 64)
    assert task.batch_size is None
    assert task.model(task.inputs[0]).shape == (6, 3)
    assert task.model[1].negative_slope == 0.2
    kinds = [type(each).__name__ for each in task.symmetries]
    assert kinds == (["Rescaling"] if bottleneck is None else ["Rescaling", "LinearPair"])
    assert load("fewshot_digits", bottleneck="none").settings()["bottleneck"] is None


@pytest.mark.parametrize(
    "settings",
    [
        {"ways": 1},
        {"ways": 5},
        {"shots": 0},
        {"shots": 100, "queries": 75},
        {"hidden": 0},
        {"bottleneck": 0},
        {"slope": 2.0},
    ],
)
def test_digit_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FamilyError, match=f"fewshot_digits.*{next(iter(settings))}"):
        load("fewshot_digits", **settings)


def test_without_learn2learn_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    learn2learn.cache_clear()
    try:
        assert main(["train", str(TASKS / "fewshot_digits.py"), "--no-track"]) == 2
    finally:
        learn2learn.cache_clear()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'metateleport[learn2learn]'" in line
    assert '--config-settings="--build-option=build_ext"' in line


@pytest.mark.slow(seconds=30)
def test_the_commands_train_and_evaluate_on_digits(tmp_path: Path) -> None:
    family = str(TASKS / "fewshot_digits.py")
    small, out = ("ways=2", "shots=1", "hidden=8", "bottleneck=3"), str(tmp_path / "out")
    sets = [*(f"family.{each}" for each in small), "outer.meta_steps=1", "validation.every=1"]
    assert main(["train", family, "--set", *sets, "--no-track", "--out", out]) == 0
    sets = ["--no-track", *(part for each in small for part in ("--set", each))]
    assert main(["evaluate", out, family, *sets, "--tasks", "2", "--steps", "3", "--methods", "learned,gd"]) == 0


# Omniglot, from a copy of a few characters in the format of the real one


@pytest.fixture
def omniglot_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Twelve characters of three alphabets; the archives are what torchvision checks, by their sums."""
    from PIL import Image

    learn2learn()
    from torchvision.datasets import Omniglot

    root = tmp_path / "data"
    folder = root / "omniglot-py"
    source = np.random.default_rng(0)
    alphabets = {"images_background": {"Greek": 5, "Latin": 3}, "images_evaluation": {"Tagalog": 4}}
    sums, number = {}, 0
    for part, contents in alphabets.items():
        for alphabet, characters in contents.items():
            for character in range(characters):
                number += 1
                own = folder / part / alphabet / f"character{character + 1:02d}"
                own.mkdir(parents=True)
                for hand in range(20):
                    ink = source.random((105, 105)) > 0.2
                    # One corner of every image says which character it is of.
                    ink[:53, :53] = number % 2
                    Image.fromarray(ink).save(own / f"{number:04d}_{hand + 1:02d}.png")
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for path in sorted((folder / part).rglob("*.png")):
                archive.write(path, path.relative_to(folder))
        sums[part] = hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(Omniglot, "zips_md5", sums)
    module_of(load("fewshot_omniglot")).drawn.cache_clear()
    yield root
    module_of(load("fewshot_omniglot")).drawn.cache_clear()


def test_omniglot_is_read_in_the_loaders_order(omniglot_copy: Path) -> None:
    from metateleport.fewshot import omniglot

    data, characters = omniglot(omniglot_copy)
    assert characters == [data[index][1] for index in range(len(data))]
    assert len(data) == 240
    assert sorted(set(characters)) == list(range(12))
    assert not (omniglot_copy / "omniglot-bookkeeping.pkl").exists(), "no pickle is read or written"


def test_omniglot_tasks_share_no_character_between_splits(omniglot_copy: Path) -> None:
    family = load("fewshot_omniglot", root=str(omniglot_copy), size=14, ways=4, shots=2, queries=6)
    _, classes = module_of(family).drawn(omniglot_copy.resolve(), False, 14)
    characters = [{each // 4 for each in classes[split]} for split in SPLITS]
    assert set.union(*characters) == set(range(12))
    assert [len(each) for each in characters] == [8, 1, 3]
    met = []
    for split in SPLITS:
        tasks = [family.task(index, split) for index in range(6)]
        assert all(task.inputs[0].shape == (8, 196) for task in tasks)
        assert all(0 <= float(images_in(task).min()) < float(images_in(task).max()) <= 1 for task in tasks)
        met.append(turns_of(torch.cat([images_in(task) for task in tasks]), 14))
    assert not met[0] & met[1]
    assert not (met[0] | met[1]) & met[2]
    stack = TaskStack([family.task(index) for index in range(2)])
    assert stack.losses_at(stack.tensors(), stack.full).shape == (2,)
    first, again = (family.task(3, "held-out") for _ in range(2))
    assert torch.equal(images_in(first), images_in(again))


def test_omniglot_turns_and_scales_the_drawing(omniglot_copy: Path) -> None:
    module = module_of(load("fewshot_omniglot"))
    images = learn2learn().vision.datasets.FullOmniglot(str(omniglot_copy))
    characters = module.Characters((images, [0] * len(images)), 28)
    drawing = 1 - np.asarray(images[21][0].resize((28, 28)), dtype=np.float32) / 255
    found = characters(torch.tensor([84, 85, 86, 87])).reshape(4, 28, 28)
    for turn in range(4):
        np.testing.assert_array_equal(found[turn].numpy(), np.rot90(drawing, turn))
    assert characters.labels()[:5] == [0, 1, 2, 3, 0]


def test_omniglot_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FamilyError, match=r"no Omniglot in .*download=true.*images_background\.zip"):
        load("fewshot_omniglot", root=str(tmp_path)).task(0)
    learn2learn()
    from torchvision.datasets import omniglot as loader

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(loader, "download_and_extract_archive", unreachable)
    with pytest.raises(FamilyError, match=r"could not be fetched .*network is unreachable.*images_background\.zip"):
        load("fewshot_omniglot", root=str(tmp_path), download=True).task(0)


def test_omniglot_settings_that_cannot_work_are_refused(omniglot_copy: Path) -> None:
    for settings in ({"ways": 1}, {"shots": 11}, {"queries": 0}, {"size": 0}, {"bottleneck": 0}, {"slope": -1.0}):
        with pytest.raises(FamilyError, match=next(iter(settings))):
            load("fewshot_omniglot", **settings)
    with pytest.raises(FamilyError, match=r"validation split of .* has 4 classes"):
        load("fewshot_omniglot", root=str(omniglot_copy), ways=5).task(0, "validation")
