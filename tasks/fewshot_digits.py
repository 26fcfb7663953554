"""Few-shot classification of real handwritten digits, upright and lying on their side, after a few images of each."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

from metateleport import Task
from metateleport.families import FamilyError, Split, split_of
from metateleport.fewshot import Episodes, FewShotFamily, MissingLearn2Learn

PIXELS = 64
TURNS = 2
"""Upright, and by a quarter: by a half 0, 1 and 8 would meet themselves, and 6 and 9 each other."""
# The rarest digit has 174 images.
IMAGES = 174
DIGITS: dict[Split, tuple[int, ...]] = {"train": (0, 3, 4, 7, 8), "validation": (2, 6), "held-out": (1, 5, 9)}
"""No digit belongs to two splits, so neither does a class or an image; two turns make classes of each."""


def classes_of(split: Split) -> tuple[int, ...]:
    """The classes of a split: every digit of it, in every turn."""
    return tuple(digit * TURNS + turn for digit in DIGITS[split] for turn in range(TURNS))


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Images in float64, `(n, 64)`, and their classes, `(n,)`.

    Pixels are scaled to [0, 1], then by mean and deviation of all pixels of the digits that are trained on.

    Raises:
        FamilyError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FamilyError(
            "the digits come with scikit-learn, which is not installed: pip install 'metateleport[tasks]'"
        ) from error
    bunch = load_digits()
    upright, digits = torch.from_numpy(bunch.images) / 16, torch.from_numpy(bunch.target)
    known = upright[torch.isin(digits, torch.tensor(DIGITS["train"]))]
    upright = (upright - known.mean()) / known.std()
    turned = torch.stack([torch.rot90(upright, turn, (1, 2)) for turn in range(TURNS)], 1)
    classes = digits.unsqueeze(1) * TURNS + torch.arange(TURNS)
    return turned.flatten(0, 1).flatten(1), classes.flatten()


@functools.cache
def episodes() -> Episodes:
    """Where tasks are drawn from.

    Raises:
        FamilyError: if learn2learn is not installed.
    """
    pixels, classes = images()
    try:
        return Episodes(classes.tolist(), pixels.__getitem__)
    except MissingLearn2Learn as error:
        raise FamilyError(f"few-shot tasks are made by learn2learn: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotDigits(FewShotFamily):
    """Few-shot classification of handwritten digits: other classes, images and initialisation a task.

    A class is a digit in one of two turns. The splits share out the digits, so that a held-out task is about
    classes and images that no training task has met. The few images to adapt to are the training data of a task,
    further images of the same classes are its held-out data.

    Settings:
        ways: classes that a task has to tell apart.
        shots: images a class to adapt to.
        queries: held-out images a class.
        hidden: units of the hidden layer.
        bottleneck: width of a linear layer between the hidden layer and the outputs, or `none`: with it, GL is an
            exact symmetry beside rescaling.
        slope: of LeakyReLU below zero.
    """

    name: ClassVar[str] = "fewshot_digits"

    def __post_init__(self) -> None:
        fewest = min(len(classes_of(split)) for split in DIGITS)
        if not 2 <= self.ways <= fewest:
            raise FamilyError(
                f"fewshot_digits: ways has to lie between 2 and {fewest}, the fewest classes of a split; it is "
                f"{self.ways}"
            )
        if min(self.shots, self.queries) < 1 or self.shots + self.queries > IMAGES:
            raise FamilyError(
                f"fewshot_digits: shots and queries have to be at least 1 and together at most {IMAGES}, the images "
                f"of the rarest class; got shots={self.shots}, queries={self.queries}"
            )
        self._check_network()

    def sample(self, seed: int) -> Task:
        classes = classes_of(split_of(seed))
        return self.task_of(episodes().sample(classes, self.ways, self.shots, self.queries, seed), seed)
