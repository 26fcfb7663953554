"""Noisy quadratics, on which a short horizon asks for too short a step."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from metateleport.families import Measure, Task, TaskFamily

__all__ = ["NoisyQuadratic"]


class _Distances(nn.Module):
    """Holds x, takes centres, gives half of the weighted squared distance to each."""

    spectrum: Tensor

    def __init__(self, x: Tensor, spectrum: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)
        self.register_buffer("spectrum", spectrum)

    def forward(self, centres: Tensor) -> Tensor:
        return ((self.x - centres).square() * self.spectrum).sum(-1) / 2


def _mean(values: Tensor) -> Tensor:
    return values.mean()


def _excess(tensors: dict[str, Tensor], spectrum: Tensor) -> Tensor:
    return (tensors["x"].square() * spectrum).sum() / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyQuadratic(TaskFamily):
    r"""$\tfrac12 \sum_i h_i (x_i - c_i)^2$ with a new centre $c$ at every evaluation, and its mean at the origin.

    Curvatures $h_i$ are log-spaced from 1 / condition to 1, and every direction adds the same to the noise of the loss.
    A long step makes the noise that the steep directions gather larger at once, and brings the flat ones to the origin
    only later: over a few steps the best is shorter than over many.

    Settings:
        dimension: length of x.
        condition: the largest curvature over the smallest.
        noise: root mean square of each direction's centre, in units of its start.
        samples: number of centres.
        batch: centres of one evaluation.

    Example:
        >>> NoisyQuadratic(dimension=3).task(0).model.spectrum[-1]
        tensor(1.)

    Source: Wu, Ren, Liao and Grosse, "Understanding short-horizon bias in stochastic meta-optimization", ICLR 2018
    (arXiv 1803.02021), section 2.
    """

    name: ClassVar[str] = "noisy_quadratic"

    dimension: int = 20
    condition: float = 1000.0
    noise: float = 1.0
    samples: int = 1000
    batch: int = 1

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        spectrum = self.condition ** torch.linspace(-1, 0, self.dimension)
        drawn = torch.randn(self.samples + 1, self.dimension, generator=source) / spectrum.sqrt()
        centres = self.noise * (drawn[1:] - drawn[1:].mean(0))
        measure = Measure("excess loss", _excess, (spectrum,))
        model = _Distances(drawn[0], spectrum)
        return Task(model, _mean, (centres,), (), batch_size=self.batch, seed=seed, measure=measure)
