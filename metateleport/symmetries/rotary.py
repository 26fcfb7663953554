"""The matrices that commute with rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.groups import GeneralLinear

__all__ = ["PlaneScaling"]


class PlaneScaling(GeneralLinear):
    r"""Scaled rotations in $k/2$ planes, $(\mathbb{C}^*)^{k/2}$: the matrices that commute with rotary embeddings.

    Plane $i$ is spanned by the coordinates $i$ and $i + k/2$, on which an element is
    $\begin{pmatrix} a_i & -b_i \\ b_i & a_i \end{pmatrix}$. The dimension is $k$.

    Args:
        size: $k$, even.

    Raises:
        ValueError: if `size` is not a positive even integer.

    Example:
        >>> group = PlaneScaling(4)
        >>> group.dimension
        4
        >>> element = group.random(seed=0, dtype=torch.float64)
        >>> bool(torch.allclose(element, group.project(element)))
        True
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        if size % 2:
            raise ValueError(f"planes need an even number of dimensions, not {size}")

    @property
    def dimension(self) -> int:
        return self.size

    def project(self, matrix: Tensor) -> Tensor:
        half = self.size // 2
        top, bottom = matrix.split(half, -2)
        a, b = top.split(half, -1)
        c, d = bottom.split(half, -1)
        real = torch.diagonal(a + d, dim1=-2, dim2=-1) / 2
        turn = torch.diagonal(c - b, dim1=-2, dim2=-1) / 2
        real, turn = real.diag_embed(), turn.diag_embed()
        return torch.cat((torch.cat((real, -turn), -1), torch.cat((turn, real), -1)), -2)

    def exp(self, generator: Tensor) -> Tensor:
        # Projected, so that a generator chosen among all matrices does not leave the group.
        return super().exp(self.project(generator))

    def inverse(self, element: Tensor) -> Tensor:
        return self.project(super().inverse(element))
