"""Matrix sensing: recover a matrix of low rank from random measurements as the product of two factors."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import LinearPair, Task, TaskFamily
from metateleport.families import FamilyError, Measure

# Eight times as many measurements as the width times the rank: four for each unknown.
OVERSAMPLING = 8
# Beyond this the smallest singular value drowns in the rounding of the others.
LARGEST_CONDITION = 1e12


class Factors(nn.Module):
    """Holds U and V, takes measurement matrices A in rows, gives the measurements <A, U V>."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first = nn.utils.skip_init(nn.Linear, first.shape[1], first.shape[0], bias=False)
        self.second = nn.utils.skip_init(nn.Linear, second.shape[1], second.shape[0], bias=False)
        with torch.no_grad():
            self.first.weight.copy_(first)
            self.second.weight.copy_(second)
        self.register_buffer("one", torch.eye(first.shape[1]))

    def forward(self, measured: Tensor) -> Tensor:
        # What passes between the layers is V itself, whatever the batch: the product is made once.
        product = self.second(self.first(self.one)).mT
        return measured.flatten(-2) @ product.flatten()


def half_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


def squared_relative_error(parameters: dict[str, Tensor], sought: Tensor) -> Tensor:
    """|U V - M|^2 / |M|^2, in the Frobenius norm."""
    product = parameters["second.weight"] @ parameters["first.weight"]
    return (product - sought).square().sum() / sought.square().sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixFactorisation(TaskFamily):
    """Matrix sensing, `y = <A, U V>`: here GL of the rank is an exact symmetry on every batch.

    The matrix sought has the rank of the factors and log-spaced singular values, the largest being the width over
    four; the measurement matrices are Gaussian, 8 * width * rank of them, and both factors start from 0.3 N(0, 1).
    A task is judged by the squared relative error of U V, noise or not.

    Settings:
        width: rows and columns of the matrix.
        rank: of the matrix and of both factors.
        condition: ratio of its largest to its smallest singular value.
        batch: measurements a minibatch; `all` for the whole set.
        noise: standard deviation of noise added to the measurements, relative to theirs.
        wide: whether training tasks go far beyond these settings, see `augmented`.
    """

    name: ClassVar[str] = "matrix_factorisation"
    dtype: ClassVar[torch.dtype] = torch.float64

    width: int = 20
    rank: int = 5
    condition: float = 10.0
    batch: int | None = 100
    noise: float = 0.0
    wide: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= self.width:
            raise FamilyError(
                f"matrix_factorisation: rank={self.rank} has to lie between 1 and width={self.width}, the rows and "
                "columns of the matrix"
            )
        if not 1 <= self.condition <= LARGEST_CONDITION:
            raise FamilyError(
                f"matrix_factorisation: condition has to lie between 1 and {LARGEST_CONDITION:g}, it is "
                f"{self.condition}"
            )
        if self.batch is not None and not 1 <= self.batch <= self.measurements:
            raise FamilyError(
                f"matrix_factorisation: batch={self.batch} has to lie between 1 and {self.measurements}, the "
                "measurements of this width and rank"
            )
        if not 0 <= self.noise < math.inf:
            raise FamilyError(f"matrix_factorisation: noise is a relative standard deviation, not {self.noise}")

    def augmented(self, index: int, seed: int) -> MatrixFactorisation:
        """Widths from 0.6 to 1.2 times the setting, ranks up to 1.4 times, conditions from 1 to 300.

        With `wide` widths up to 1.5 times, ranks up to twice, conditions to 30000. Half of the stacks keep the noise of
        the setting; the others have some between 0.01 and 0.3.
        """
        source = np.random.default_rng([seed, index])
        widest, highest, largest = (1.5, 2.0, 30_000.0) if self.wide else (1.2, 1.4, 300.0)
        width = max(int(source.integers(round(0.6 * self.width), round(widest * self.width) + 1)), 1)
        rank = int(source.integers(max(round(0.4 * self.rank), 1), round(highest * self.rank) + 1))
        drawn = dataclasses.replace(
            self, width=width, rank=min(rank, width), condition=float(largest ** source.uniform()), batch=None
        )
        if source.random() < 1 / 2:
            drawn = dataclasses.replace(drawn, noise=float(0.01 * 30 ** source.uniform()))
        return dataclasses.replace(drawn, batch=self.batch and min(self.batch, drawn.measurements))

    @property
    def measurements(self) -> int:
        return OVERSAMPLING * self.width * self.rank

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        left, right = (torch.linalg.qr(torch.randn(self.width, self.rank, generator=source))[0] for _ in range(2))
        spectrum = self.width / 4 * self.condition ** torch.linspace(0, -1, self.rank)
        sought = (left * spectrum) @ right.mT
        first = 0.3 * torch.randn(self.rank, self.width, generator=source)
        second = 0.3 * torch.randn(self.width, self.rank, generator=source)
        matrices = torch.randn(self.measurements, self.width, self.width, generator=source)
        exact = matrices.flatten(1) @ sought.flatten()
        # The measurements' standard deviation is the norm of the matrix.
        targets = exact + self.noise * sought.norm() * torch.randn(exact.shape, generator=source)
        model = Factors(first, second)
        return Task(
            model=model,
            loss=half_mean_squared_error,
            inputs=(matrices,),
            targets=(targets,),
            symmetries=[LinearPair(model, "first", "second")],
            batch_size=self.batch,
            seed=seed,
            measure=Measure("squared relative error", squared_relative_error, (sought,)),
        )
