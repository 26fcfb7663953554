"""Few-shot classification of real handwritten digits, upright and lying on their side, after a few images of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn

from metateleport import FamilyError, LinearPair, Rescaling, Symmetry, Task, TaskFamily
from metateleport.families import Split, split_of
from metateleport.metalearning import Episodes, MissingLearn2Learn

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


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the samples, the last dimension of `targets`, whose largest output is the right one."""
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotDigits(TaskFamily):
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

    ways: int = 4
    shots: int = 5
    queries: int = 15
    hidden: int = 32
    bottleneck: int | None = 8
    slope: float = 0.1

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
        if self.hidden < 1 or (self.bottleneck is not None and self.bottleneck < 1):
            raise FamilyError(
                f"fewshot_digits: hidden and bottleneck are widths of at least 1; got hidden={self.hidden}, "
                f"bottleneck={self.bottleneck}"
            )
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"fewshot_digits: slope has to lie between 0 and 1, it is {self.slope}")

    def sample(self, seed: int) -> Task:
        classes = classes_of(split_of(seed))
        support, query = episodes().sample(classes, self.ways, self.shots, self.queries, seed)
        model = self._network(torch.Generator().manual_seed(seed))
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(support[0].to(torch.get_default_dtype()),),
            targets=(support[1],),
            symmetries=self._symmetries(model),
            seed=seed,
            held_out=((query[0].to(torch.get_default_dtype()),), (query[1],)),
            score=accuracy,
        )

    def _network(self, source: torch.Generator) -> nn.Sequential:
        """The usual start of `nn.Linear`, drawn from `source`."""
        sizes = [PIXELS, self.hidden, *([] if self.bottleneck is None else [self.bottleneck]), self.ways]
        layers: list[nn.Module] = []
        for incoming, outgoing in itertools.pairwise(sizes):
            layer = nn.utils.skip_init(nn.Linear, incoming, outgoing)
            bound = incoming**-0.5
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=source)
                layer.bias.uniform_(-bound, bound, generator=source)
            layers.append(layer)
        return nn.Sequential(layers[0], nn.LeakyReLU(self.slope), *layers[1:])

    def _symmetries(self, model: nn.Sequential) -> list[Symmetry]:
        rescaling = Rescaling(model, "0", "2")
        return [rescaling] if self.bottleneck is None else [rescaling, LinearPair(model, "2", "3")]
