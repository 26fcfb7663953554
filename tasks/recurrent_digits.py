"""Real digits, read row by row by a gated recurrent unit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Symmetry
from metateleport.families import FamilyError
from metateleport.families.classification import ClassificationFamily, data_of, linear
from metateleport.families.labelled import LabelledData

# An image is eight steps, its rows, of eight pixels each.
STEPS = PIXELS = 8


class RowReader(nn.Module):
    """A gated recurrent unit over the rows, and a linear head on its last state.

    It is written with linear layers: the fused recurrent kernels cannot be batched over tasks, and have no second
    derivative.
    """

    def __init__(self, layer: Callable[[int, int], nn.Linear], hidden: int, classes: int) -> None:
        super().__init__()
        self.from_row, self.from_state = layer(PIXELS, 3 * hidden), layer(hidden, 3 * hidden)
        self.head = layer(hidden, classes)
        self.hidden = hidden

    def forward(self, images: Tensor) -> Tensor:
        rows = self.from_row(images.unflatten(-1, (STEPS, PIXELS)))
        state = images.new_zeros(*images.shape[:-1], self.hidden)
        for step in range(STEPS):
            reset, update, new = rows[..., step, :].chunk(3, -1)
            own_reset, own_update, own_new = self.from_state(state).chunk(3, -1)
            gate = torch.sigmoid(update + own_update)
            candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
            state = gate * state + (1 - gate) * candidate
        return self.head(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentDigits(ClassificationFamily):
    """Classification of handwritten digits by a gated recurrent unit, row by row.

    Classes, images and splits are those of `digits`.

    Settings:
        hidden: units of the state.
        classes: digits that a task has to tell apart.
        samples: training images a task.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "recurrent_digits"
    training_each: ClassVar[int] = 140

    hidden: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise FamilyError(f"recurrent_digits needs at least one unit, not hidden={self.hidden}")

    def augmented(self, index: int, seed: int) -> RecurrentDigits:
        """States from half to one and a half times as wide as the setting, and data as in `digits`."""
        source = np.random.default_rng([seed, index])
        hidden = int(source.integers(round(0.5 * self.hidden), round(1.5 * self.hidden) + 1))
        return dataclasses.replace(self, hidden=max(hidden, 1), **self._varied(source))

    def data(self) -> LabelledData:
        return data_of("digits")

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        return RowReader(functools.partial(linear, source=source, scale=self.scale), self.hidden, self.classes), []
