"""Regression on the noisy labels of a teacher network, in minibatches: more samples than the last layer can fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Rescaling, Task, TaskFamily
from metateleport.families import FamilyError

HELD_OUT_SAMPLES = 500


def half_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half of the squared error of a sample, on average: of one scale whatever the batch."""
    return (outputs - targets).square().sum(-1).mean() / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher(TaskFamily):
    r"""A LeakyReLU network learns what another one of its shape computes, from noisy labels.

    $$L = \frac{1}{2} \operatorname{mean}_x |f_W(x) - f_{W^*}(x) - \sigma \epsilon|^2, \qquad x \sim N(0, 1),$$

    with $\sigma$ the noise times the standard deviation of the teacher's outputs. Weights of both networks are
    $N(0, \text{scale}^2)$, as in `leaky_mlp` with `distribution=normal`. The labels of held-out samples carry no
    noise: the loss there is the distance from the teacher.

    No layer can fit the labels alone, and a batch pair would hold on one batch only: the symmetries are the
    rescalings through LeakyReLU, exact on every batch.

    Settings:
        width: units of every layer, inputs and outputs included.
        samples: number of training samples.
        batch: samples a minibatch; `all` for the whole set.
        noise: standard deviation of the noise on the labels, relative to theirs.
        depth: number of weight matrices.
        scale: standard deviation of the weights, of the student at its start and of the teacher.
        slope: of LeakyReLU below zero.
    """

    name: ClassVar[str] = "teacher"
    dtype: ClassVar[torch.dtype] = torch.float64

    width: int = 20
    samples: int = 2000
    batch: int | None = 50
    noise: float = 0.1
    depth: int = 2
    scale: float = 1.0
    slope: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 2 or self.samples < 1:
            raise FamilyError(
                f"teacher needs a width of at least 1, a depth of at least 2 and at least one sample; got "
                f"width={self.width}, depth={self.depth}, samples={self.samples}"
            )
        if self.batch is not None and not 1 <= self.batch <= self.samples:
            raise FamilyError(f"teacher: batch={self.batch} has to lie between 1 and samples={self.samples}")
        if not 0 <= self.noise < math.inf:
            raise FamilyError(f"teacher: noise is a relative standard deviation, not {self.noise}")
        if not 0 < self.scale < math.inf:
            raise FamilyError(f"teacher: scale is a positive standard deviation, not {self.scale}")
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"teacher: slope has to lie between 0 and 1, it is {self.slope}")

    def augmented(self, index: int, seed: int) -> Teacher:
        """Widths from 0.6 to 1.2 times the setting, depths up to two more, scales from a third to three times, noise up
        to three times, batches and slopes from half to twice."""
        source = np.random.default_rng([seed, index])
        width = int(source.integers(round(0.6 * self.width), round(1.2 * self.width) + 1))
        return dataclasses.replace(
            self,
            width=max(width, 1),
            depth=self.depth + int(source.integers(3)),
            scale=self.scale * float(3 ** source.uniform(-1, 1)),
            noise=self.noise * float(source.uniform(0, 3)),
            batch=self.batch and min(max(round(self.batch * 2 ** source.uniform(-1, 1)), 1), self.samples),
            slope=min(self.slope * float(2 ** source.uniform(-1, 1)), 1.0),
        )

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        model, teacher = self._network(source), self._network(source)
        inputs = torch.randn(self.samples + HELD_OUT_SAMPLES, self.width, generator=source)
        with torch.no_grad():
            labels = teacher(inputs)
        targets = labels[: self.samples]
        targets = targets + self.noise * labels.std() * torch.randn(targets.shape, generator=source)
        layers = range(0, 2 * self.depth, 2)
        return Task(
            model=model,
            loss=half_mean_squared_error,
            inputs=(inputs[: self.samples],),
            targets=(targets,),
            symmetries=[Rescaling(model, str(first), str(second)) for first, second in itertools.pairwise(layers)],
            batch_size=self.batch,
            seed=seed,
            held_out=((inputs[self.samples :],), (labels[self.samples :],)),
        )

    def _network(self, source: torch.Generator) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(self.depth):
            layer = nn.utils.skip_init(nn.Linear, self.width, self.width, bias=False)
            with torch.no_grad():
                layer.weight.copy_(self.scale * torch.randn(self.width, self.width, generator=source))
            layers += [layer, nn.LeakyReLU(self.slope)]
        return nn.Sequential(*layers[:-1])
