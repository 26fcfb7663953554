"""Real digits, told apart by a residual perceptron with normalisation, as in a transformer without attention."""

from __future__ import annotations

import dataclasses
import functools
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


class Residual(nn.Module):
    r"""Blocks $h \leftarrow h + D\,s(U \operatorname{norm}(h))$ between an embedding and a head."""

    def __init__(
        self,
        layer: Callable[[int, int], nn.Linear],
        *,
        features: int,
        width: int,
        blocks: int,
        classes: int,
        activation: Activation,
        zero_head: bool,
    ) -> None:
        super().__init__()
        self.embed = layer(features, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks + 1))
        self.up = nn.ModuleList(layer(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(layer(2 * width, width) for _ in range(blocks))
        self.activation = ACTIVATIONS[activation]()
        self.head = layer(width, classes)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        h = self.embed(inputs)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            h = h + down(self.activation(up(norm(h))))
        return self.head(self.norms[-1](h))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualDigits(ClassificationFamily):
    """Classification of handwritten digits by a residual perceptron with LayerNorm.

    Classes, images and splits are those of `digits`. The activations have no rescaling, so no symmetry is declared.

    Settings:
        width: features between the blocks; within a block there are twice as many.
        blocks: number of residual blocks.
        activation: of the blocks.
        zero_head: whether the last layer starts at zero.
        classes: digits that a task has to tell apart.
        samples: training images a task.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "residual_digits"
    training_each: ClassVar[int] = 140

    width: int = 24
    blocks: int = 2
    activation: Activation = "gelu"
    zero_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 2 or self.blocks < 1:
            raise FamilyError(
                f"residual_digits needs a width of at least 2 and a block; got width={self.width}, blocks={self.blocks}"
            )

    def augmented(self, index: int, seed: int) -> ResidualDigits:
        """Widths from half to one and a half times the setting, up to two blocks more, any of the activations, a head
        at zero in a third of the batches, and data as in `digits`."""
        source = np.random.default_rng([seed, index])
        names = list(ACTIVATIONS)
        return dataclasses.replace(
            self,
            width=max(int(source.integers(round(0.5 * self.width), round(1.5 * self.width) + 1)), 2),
            blocks=self.blocks + int(source.integers(3)),
            activation=names[int(source.integers(len(names)))],
            zero_head=bool(source.uniform() < 1 / 3),
            **self._varied(source),
        )

    def data(self) -> LabelledData:
        return data_of("digits")

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        layer = functools.partial(linear, source=source, scale=self.scale)
        model = Residual(
            layer,
            features=self.data().training.shape[-1],
            width=self.width,
            blocks=self.blocks,
            classes=self.classes,
            activation=self.activation,
            zero_head=self.zero_head,
        )
        return model, []
