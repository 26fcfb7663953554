"""The source paper's regression: fit random targets with a LeakyReLU network, `1/2 |Y - W2 s(W1 X)|^2`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import LinearPair, Rescaling, Symmetry, Task, TaskFamily
from metateleport.families import FamilyError
from metateleport.symmetries import BatchPair2022, BatchPair2024

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakyMLP(TaskFamily):
    """Regression with a small multi-layer perceptron, all layers of one width (the source paper's task).

    Settings:
        width: units of every layer, inputs and outputs included.
        samples: number of samples; as many as the width if not given.
        depth: number of weight matrices.
        activation: between the layers.
        distribution: of weights and data, `uniform` on [0, 1] or standard `normal`. With uniform ones no
            pre-activation is negative at the start, so LeakyReLU is linear there.
        batch: samples a minibatch; `all` for the whole set.
        labels: `random`, or those of a `teacher` network of the same shape.
        noise: standard deviation of noise added to the labels.
        mixture: let meta-training vary the distribution, the number of samples, the depth and the labels too, not
            the width alone.
    """

    name: ClassVar[str] = "leaky_mlp"
    dtype: ClassVar[torch.dtype] = torch.float64

    width: int = 20
    samples: int | None = None
    depth: int = 2
    activation: Literal["leaky_relu", "relu", "tanh", "identity"] = "leaky_relu"
    distribution: Literal["uniform", "normal"] = "uniform"
    batch: int | None = None
    labels: Literal["random", "teacher"] = "random"
    noise: float = 0.0
    mixture: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 2 or (self.samples is not None and self.samples < 1):
            raise FamilyError(
                f"leaky_mlp needs a width of at least 1, a depth of at least 2 and at least one sample; got "
                f"width={self.width}, depth={self.depth}, samples={self.samples}"
            )
        if self.batch is not None and not 1 <= self.batch <= self.sample_count:
            raise FamilyError(f"leaky_mlp: batch={self.batch} has to lie between 1 and samples={self.sample_count}")
        if not 0 <= self.noise < math.inf:
            raise FamilyError(f"leaky_mlp: noise is a standard deviation, not {self.noise}")
        if self.activation not in ACTIVATIONS:
            raise FamilyError(f"leaky_mlp: activation is one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")

    def augmented(self, index: int, seed: int) -> LeakyMLP:
        """Widths from 0.6 to 1.2 times the setting; all else stays, or is drawn where `mixture` is set.

        A mixture has uniform and normal weights, a quarter more to twice as many samples as units, one depth more in a
        sixth of the stacks, and in a quarter of them a noisy teacher's labels in minibatches: the last layer alone
        cannot fit any of it. With fewer samples it can, and a meta-optimizer that has seen both learns only that.
        """
        source = np.random.default_rng([seed, index])
        width = max(int(source.integers(round(0.6 * self.width), round(1.2 * self.width) + 1)), 1)
        if not self.mixture:
            return dataclasses.replace(self, width=width)
        drawn = dataclasses.replace(self, width=width, depth=self.depth + int(source.random() < 1 / 6), mixture=False)
        distribution: Literal["uniform", "normal"] = "normal" if source.integers(2) else "uniform"
        noise = float(source.uniform(0, 2))
        ratio = float(source.choice([1.25, 1.5, 2.0]))
        if source.random() < 1 / 4:
            return dataclasses.replace(
                drawn, distribution="normal", samples=50 * width, batch=5 * width // 2, labels="teacher", noise=noise
            )
        return dataclasses.replace(drawn, distribution=distribution, samples=round(ratio * width))

    @property
    def sample_count(self) -> int:
        return self.width if self.samples is None else self.samples

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)

        def draw(rows: int) -> Tensor:
            function = torch.rand if self.distribution == "uniform" else torch.randn
            return function(rows, self.width, generator=source)

        model, inputs = self._network(draw), draw(self.sample_count)
        targets = draw(self.sample_count)
        if self.labels == "teacher":
            with torch.no_grad():
                targets = self._network(draw)(inputs)
        targets = targets + self.noise * torch.randn(targets.shape, generator=source)
        return Task(
            model=model,
            loss=half_squared_error,
            inputs=(inputs,),
            targets=(targets,),
            symmetries=self._symmetries(model),
            batch_size=self.batch,
            seed=seed,
        )

    def _network(self, draw: Callable[[int], Tensor]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(self.depth):
            layer = nn.utils.skip_init(nn.Linear, self.width, self.width, bias=False)
            with torch.no_grad():
                layer.weight.copy_(draw(self.width))
            layers += [layer, ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers[:-1])

    def _symmetries(self, model: nn.Sequential) -> list[Symmetry]:
        """Between neighbours GL: exact for the identity, on the batch elsewhere; rescaling where that cannot hold."""
        fits = (self.batch or self.sample_count) <= self.width
        found: list[Symmetry] = []
        for index in range(0, 2 * self.depth - 2, 2):
            first, second, between = str(index), str(index + 2), model[index + 1]
            if self.activation == "identity":
                found.append(LinearPair(model, first, second))
            elif self.activation == "leaky_relu" and fits:
                found.append(BatchPair2022(model, first, second, between))
            elif fits:
                found.append(BatchPair2024(model, first, second, between))
            elif self.activation != "tanh":
                found.append(Rescaling(model, first, second))
        return found
