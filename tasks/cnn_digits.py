"""Real digits, told apart by a small convolutional network with BatchNorm, whose statistics are those of the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Symmetry
from metateleport.families import FamilyError
from metateleport.families.classification import ClassificationFamily, data_of, linear
from metateleport.families.labelled import LabelledData

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
SIDE = 8


def convolution(incoming: int, outgoing: int, stride: int, source: torch.Generator, scale: float) -> nn.Conv2d:
    """A convolution of three by three without a bias, with torch's usual start, drawn from `source` and scaled."""
    layer = nn.utils.skip_init(nn.Conv2d, incoming, outgoing, 3, stride=stride, padding=1, bias=False)
    bound = scale / math.sqrt(9 * incoming)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=source)
    return layer


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, of which the second halves the image, the mean over pixels, and a linear head."""

    def __init__(
        self, source: torch.Generator, *, channels: int, depth: int, classes: int, activation: Activation, scale: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place in range(depth):
            layers += [
                convolution(channels if place else 1, channels, 2 if place == 1 else 1, source, scale),
                # A running mean is a state beside the weights, which a step on a stack of tasks knows nothing of.
                nn.BatchNorm2d(channels, track_running_stats=False),
                ACTIVATIONS[activation](),
            ]
        self.features = nn.Sequential(*layers)
        self.head = linear(channels, classes, source, scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images.unflatten(-1, (1, SIDE, SIDE))).mean((-2, -1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNNDigits(ClassificationFamily):
    """Classification of handwritten digits by a convolutional network with BatchNorm.

    Classes, images and splits are those of `digits`. Held-out images are normalised by the statistics of all of them
    together. No symmetry is declared.

    Settings:
        channels: of each convolution.
        depth: number of convolutions.
        activation: behind each BatchNorm.
        classes: digits that a task has to tell apart.
        samples: training images a task.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "cnn_digits"
    training_each: ClassVar[int] = 140

    channels: int = 8
    depth: int = 2
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.depth < 1:
            raise FamilyError(
                f"cnn_digits needs a channel and a convolution; got channels={self.channels}, depth={self.depth}"
            )
        if self.batch is not None and self.batch < 2:
            raise FamilyError(f"cnn_digits: batch={self.batch} has no statistics: give it two samples at least")

    def augmented(self, index: int, seed: int) -> CNNDigits:
        """Channels from half to one and a half times the setting, up to one convolution more, any of the activations,
        and data as in `digits`."""
        source = np.random.default_rng([seed, index])
        names = list(ACTIVATIONS)
        varied = {
            "channels": max(int(source.integers(round(0.5 * self.channels), round(1.5 * self.channels) + 1)), 1),
            "depth": self.depth + int(source.integers(2)),
            "activation": names[int(source.integers(len(names)))],
            **self._varied(source),
        }
        if varied["batch"] is not None:
            varied["batch"] = max(varied["batch"], 2)
        return dataclasses.replace(self, **varied)

    def data(self) -> LabelledData:
        return data_of("digits")

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        model = ConvNet(
            source,
            channels=self.channels,
            depth=self.depth,
            classes=self.classes,
            activation=self.activation,
            scale=self.scale,
        )
        return model, []
