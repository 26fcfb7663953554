"""Real digits, row by row through an attention block and linear bottlenecks: GL(k) is exact on every minibatch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import LinearPair, Rescaling, Symmetry
from metateleport.families import FamilyError
from metateleport.families.classification import ClassificationFamily, data_of, linear
from metateleport.families.labelled import LabelledData
from metateleport.symmetries import AttentionQK, AttentionVO

# An image is eight tokens, its rows, of eight pixels each.
TOKENS = PIXELS = 8


class RowClassifier(nn.Module):
    r"""Self-attention between the rows of an image, then two linear bottlenecks with a LeakyReLU between them.

    $$h = s(E + W_O \operatorname{softmax}(Q K^\top / \sqrt{d})\,V), \qquad y = U_2 V_2\, s(U_1 V_1 h).$$
    """

    def __init__(
        self,
        layer: Callable[..., nn.Linear],
        *,
        width: int,
        heads: int,
        rank: int,
        hidden: int,
        classes: int,
        slope: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.embed = layer(PIXELS, width)
        # The softmax does not see a bias of the keys.
        self.key = layer(width, width, bias=False)
        self.query, self.value, self.out = (layer(width, width) for _ in range(3))
        self.narrow, self.widen = layer(TOKENS * width, rank), layer(rank, hidden)
        self.narrow_again, self.classify = layer(hidden, rank), layer(rank, classes)
        self.activation = nn.LeakyReLU(slope)

    def forward(self, images: Tensor) -> Tensor:
        embedded = self.embed(images.unflatten(-1, (TOKENS, PIXELS)))
        query, key, value = (self._split(layer(embedded)) for layer in (self.query, self.key, self.value))
        # Written out: the fused kernels have no second derivative.
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        mixed = (weights @ value).transpose(-3, -2).flatten(-2)
        seen = self.activation(embedded + self.out(mixed)).flatten(-2)
        return self.classify(self.narrow_again(self.activation(self.widen(self.narrow(seen)))))

    def _split(self, tokens: Tensor) -> Tensor:
        """`(samples, tokens, width)` as `(samples, heads, tokens, size)`."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckDigits(ClassificationFamily):
    """Classification of handwritten digits by a network whose symmetries are GL, exact on every batch.

    Classes, images and splits are those of `digits`. Each head has the symmetries of its queries with its keys and of
    its values with the output layer; each bottleneck is a linear pair, and between the two is a rescaling.

    Settings:
        width: features of a token.
        heads: of the attention, which share the width out.
        rank: of the bottlenecks.
        hidden: units between the bottlenecks.
        slope: of LeakyReLU below zero.
        classes: digits that a task has to tell apart.
        samples: training images a task.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "bottleneck_digits"
    training_each: ClassVar[int] = 140

    width: int = 16
    heads: int = 2
    rank: int = 6
    hidden: int = 32
    slope: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise FamilyError(
                f"bottleneck_digits: width={self.width} has to be a multiple of heads={self.heads}, which share it out"
            )
        if self.rank < 1 or self.hidden < 1:
            raise FamilyError(
                f"bottleneck_digits needs a rank and a hidden width of at least 1; got rank={self.rank}, "
                f"hidden={self.hidden}"
            )
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"bottleneck_digits: slope has to lie between 0 and 1, it is {self.slope}")

    def augmented(self, index: int, seed: int) -> BottleneckDigits:
        """Head sizes, ranks and hidden widths from half to one and a half times the settings, at most twice as many
        heads, and data as in `digits`."""
        source = np.random.default_rng([seed, index])

        def around(setting: int) -> int:
            return max(int(source.integers(round(0.5 * setting), round(1.5 * setting) + 1)), 1)

        heads = int(source.integers(1, 2 * self.heads + 1))
        return dataclasses.replace(
            self,
            width=heads * around(self.width // self.heads),
            heads=heads,
            rank=around(self.rank),
            hidden=around(self.hidden),
            **self._varied(source),
        )

    def data(self) -> LabelledData:
        return data_of("digits")

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        layer = functools.partial(linear, source=source, scale=self.scale)
        model = RowClassifier(
            layer,
            width=self.width,
            heads=self.heads,
            rank=self.rank,
            hidden=self.hidden,
            classes=self.classes,
            slope=self.slope,
        )
        return model, [
            *AttentionQK.of_heads(model, "query", "key", self.heads),
            *AttentionVO.of_heads(model, "value", "out", self.heads),
            LinearPair(model, "narrow", "widen"),
            Rescaling(model, "widen", "narrow_again"),
            LinearPair(model, "narrow_again", "classify"),
        ]
