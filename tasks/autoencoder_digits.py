"""Real digits, drawn again from a few numbers: a regression in which the images are their own targets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from metateleport import LinearPair, Rescaling, Symmetry, Task
from metateleport.families import FamilyError
from metateleport.families.classification import ClassificationFamily, data_of, linear
from metateleport.families.labelled import LabelledData


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderDigits(ClassificationFamily):
    """Images of handwritten digits through a linear bottleneck and back, by the mean squared error of a pixel.

    Classes, images and splits are those of `digits`. The bottleneck is a linear pair, and the hidden layers on both
    sides of it have rescalings.

    Settings:
        hidden: units of the hidden layer on each side.
        code: numbers that an image goes through.
        slope: of LeakyReLU below zero.
        classes: digits that a task has images of.
        samples: training images a task.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
        label_noise: zero, as there are no labels.
    """

    name: ClassVar[str] = "autoencoder_digits"
    training_each: ClassVar[int] = 140

    hidden: int = 32
    code: int = 8
    slope: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or self.code < 1:
            raise FamilyError(
                f"autoencoder_digits needs a hidden unit and a code of at least one number; got hidden={self.hidden}, "
                f"code={self.code}"
            )
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"autoencoder_digits: slope has to lie between 0 and 1, it is {self.slope}")
        if self.label_noise:
            raise FamilyError("autoencoder_digits has no labels: leave out label_noise")

    def augmented(self, index: int, seed: int) -> AutoencoderDigits:
        """Hidden layers and codes from half to one and a half times the settings, and data as in `digits`."""
        source = np.random.default_rng([seed, index])

        def around(setting: int) -> int:
            return max(int(source.integers(round(0.5 * setting), round(1.5 * setting) + 1)), 1)

        varied = {**self._varied(source), "label_noise": 0.0}
        return dataclasses.replace(self, hidden=around(self.hidden), code=around(self.code), **varied)

    def data(self) -> LabelledData:
        return data_of("digits")

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        features = self.data().training.shape[-1]
        layers = [
            linear(incoming, outgoing, source, self.scale)
            for incoming, outgoing in itertools.pairwise([features, self.hidden, self.code, self.hidden, features])
        ]
        into, narrow, widen, out = layers
        model = nn.Sequential(into, nn.LeakyReLU(self.slope), narrow, widen, nn.LeakyReLU(self.slope), out)
        return model, [Rescaling(model, "0", "2"), LinearPair(model, "2", "3"), Rescaling(model, "3", "5")]

    def sample(self, seed: int) -> Task:
        task = super().sample(seed)
        assert task.held_out is not None
        unseen = task.held_out[0]
        return dataclasses.replace(
            task, loss=nn.functional.mse_loss, targets=task.inputs, held_out=(unseen, unseen), score=None
        )
