"""Real handwritten digits (scikit-learn's 1797 images of 8x8 pixels), told apart by a LeakyReLU classifier."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import FamilyError, Rescaling, Task, TaskFamily
from metateleport.families import Split, split_of

DIGITS = 10
PIXELS = 64
# The rarest digit has 174 images.
TRAINING_IMAGES = 140
HELD_OUT_IMAGES = 34
# Of every five subsets of the digits, shares of the splits; validation and held-out tasks need few.
SHARES: dict[Split, tuple[int, ...]] = {"train": (0, 1, 2), "validation": (3,), "held-out": (4,)}


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Training and held-out images by digit, `(10, 140, 64)` and `(10, 34, 64)` in float64; the same in every task.

    Pixels are scaled to [0, 1], then by mean and deviation of all training pixels together: some pixels are always
    blank, and have no deviation of their own.

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
    order = np.random.default_rng(0).permutation(len(bunch.target))
    pixels, digits = bunch.data[order] / 16, bunch.target[order]
    count = TRAINING_IMAGES + HELD_OUT_IMAGES
    by_digit = torch.from_numpy(np.stack([pixels[digits == digit][:count] for digit in range(DIGITS)]))
    training, held_out = by_digit[:, :TRAINING_IMAGES], by_digit[:, TRAINING_IMAGES:]
    mean, deviation = training.mean(), training.std()
    return (training - mean) / deviation, (held_out - mean) / deviation


@functools.cache
def subsets(classes: int, split: Split) -> tuple[tuple[int, ...], ...]:
    """The sets of digits that tasks of a split may have to tell apart; no set belongs to two splits."""
    every = list(itertools.combinations(range(DIGITS), classes))
    order = np.random.default_rng(classes).permutation(len(every))
    return tuple(every[number] for place, number in enumerate(order) if place % 5 in SHARES[split])


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the samples, the last dimension of `targets`, whose largest output is the right one."""
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(TaskFamily):
    """Classification of handwritten digits: another subset of classes, initialisation and batch order a task.

    The subsets of held-out tasks are never met in training, nor are the images that accuracy is measured on, in any
    task.

    Settings:
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        classes: digits that a task has to tell apart.
        samples: training images a task, drawn from all images of its classes but the held-out ones.
        batch: samples a minibatch; `all` for the whole set.
        slope: of LeakyReLU below zero.
    """

    name: ClassVar[str] = "digits"

    hidden: int = 32
    depth: int = 2
    classes: int = 5
    samples: int = 640
    batch: int | None = 64
    slope: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.depth < 2:
            raise FamilyError(
                f"digits needs at least 1 hidden unit and a depth of at least 2; got hidden={self.hidden}, "
                f"depth={self.depth}"
            )
        if not 2 <= self.classes < DIGITS:
            raise FamilyError(
                f"digits: classes has to lie between 2 and {DIGITS - 1}, it is {self.classes}: the splits share out "
                "the subsets of the ten digits, and all ten make only one"
            )
        largest = self.classes * TRAINING_IMAGES
        if not self.classes <= self.samples <= largest:
            raise FamilyError(
                f"digits: samples={self.samples} has to lie between {self.classes} and {largest}, the training images "
                f"of {self.classes} classes"
            )
        if self.batch is not None and not 1 <= self.batch <= self.samples:
            raise FamilyError(f"digits: batch={self.batch} has to lie between 1 and samples={self.samples}")
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"digits: slope has to lie between 0 and 1, it is {self.slope}")

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        possible = subsets(self.classes, split_of(seed))
        chosen = list(possible[int(torch.randint(len(possible), (), generator=source))])
        training, held_out = (part[chosen].to(torch.get_default_dtype()) for part in images())
        rows = torch.randperm(self.classes * TRAINING_IMAGES, generator=source)[: self.samples]
        model = self._network(source)
        linear = range(0, 2 * self.depth, 2)
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(training.flatten(0, 1)[rows],),
            targets=(_labels(training).flatten()[rows],),
            symmetries=[Rescaling(model, str(first), str(second)) for first, second in itertools.pairwise(linear)],
            batch_size=self.batch,
            seed=seed,
            held_out=((held_out.flatten(0, 1),), (_labels(held_out).flatten(),)),
            score=accuracy,
        )

    def _network(self, source: torch.Generator) -> nn.Sequential:
        """A multi-layer perceptron with the usual start of `nn.Linear`, drawn from `source`."""
        sizes = [PIXELS, *[self.hidden] * (self.depth - 1), self.classes]
        layers: list[nn.Module] = []
        for incoming, outgoing in itertools.pairwise(sizes):
            layer = nn.utils.skip_init(nn.Linear, incoming, outgoing)
            bound = incoming**-0.5
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=source)
                layer.bias.uniform_(-bound, bound, generator=source)
            layers += [layer, nn.LeakyReLU(self.slope)]
        return nn.Sequential(*layers[:-1])


def _labels(by_class: Tensor) -> Tensor:
    """The number of its class for every image, `(classes, images)`."""
    return torch.arange(by_class.shape[0]).unsqueeze(1).expand(by_class.shape[:2])
