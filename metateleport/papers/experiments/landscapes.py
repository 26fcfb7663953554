"""Test functions whose level sets are spheres in a chart, and the rotations that move along them."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metateleport.groups import Orthogonal
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.symmetries.base import Carried

__all__ = ["Booth", "ChartRotation", "Landscape", "Rosenbrock", "level_set", "valley"]


class Landscape(nn.Module, abc.ABC):
    r"""A function $f(x) = |\varphi(x)|^2$ of a chart $\varphi$, a smooth bijection of $\mathbb{R}^n$.

    Args:
        x: where it stands, `(n,)`.
    """

    name: str
    start: tuple[float, ...]
    """Where the 2022 paper starts."""

    def __init__(self, x: Tensor | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(self.start, dtype=torch.float64) if x is None else x.clone())

    @staticmethod
    @abc.abstractmethod
    def chart(x: Tensor) -> Tensor:
        r"""$\varphi(x)$, `(n,)`."""

    @staticmethod
    @abc.abstractmethod
    def inverse(u: Tensor) -> Tensor:
        r"""$\varphi^{-1}(u)$, `(n,)`."""

    @classmethod
    def value(cls, x: Tensor) -> Tensor:
        """The function at `x`, a scalar."""
        return cls.chart(x).square().sum()

    def forward(self) -> Tensor:
        return self.value(self.x)


class Booth(Landscape):
    r"""Booth's function, $(x + 2y - 7)^2 + (2x + y - 5)^2$, minimal at (1, 3).

    Example:
        >>> float(Booth(torch.tensor([1.0, 3.0]))())
        0.0

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), and the code of its test functions.
    """

    name = "booth"
    start = (5.0, -5.0)

    @staticmethod
    def chart(x: Tensor) -> Tensor:
        return torch.stack([x[0] + 2 * x[1] - 7, 2 * x[0] + x[1] - 5])

    @staticmethod
    def inverse(u: Tensor) -> Tensor:
        return torch.stack([(2 * u[1] - u[0]) / 3 + 1, (2 * u[0] - u[1]) / 3 + 3])


class Rosenbrock(Landscape):
    r"""Rosenbrock's function, $100 (x^2 - y)^2 + (x - 1)^2$, minimal at (1, 1); not convex.

    Example:
        >>> float(Rosenbrock(torch.tensor([1.0, 1.0]))())
        0.0

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), and the code of its test functions.
    """

    name = "rosenbrock"
    start = (-1.0, -1.0)

    @staticmethod
    def chart(x: Tensor) -> Tensor:
        return torch.stack([10 * (x[0] ** 2 - x[1]), x[0] - 1])

    @staticmethod
    def inverse(u: Tensor) -> Tensor:
        return torch.stack([u[1] + 1, (u[1] + 1) ** 2 - u[0] / 10])


def valley(bend: float, slant: float) -> type[Landscape]:
    r"""A bent valley, $x^2 + 4 (y + b x^2 + s x)^2$; with $s = 0$ it is its own mirror image in the y-axis.

    Args:
        bend: $b$.
        slant: $s$.

    Example:
        >>> float(valley(0.2, 0.0)(torch.tensor([0.0, 0.5]))())
        1.0
    """

    class Valley(Landscape):
        name = "valley"
        start = (0.0, 0.5)

        @staticmethod
        def chart(x: Tensor) -> Tensor:
            return torch.stack([x[0], 2 * (x[1] + bend * x[0] ** 2 + slant * x[0])])

        @staticmethod
        def inverse(u: Tensor) -> Tensor:
            return torch.stack([u[0], u[1] / 2 - bend * u[0] ** 2 - slant * u[0]])

    return Valley


def level_set(kind: type[Landscape], start: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The points that rotations by some angles bring a point of the plane to, and the gradient norms there.

    Args:
        kind: a function of two numbers.
        start: a point of the level set, `(2,)`.
        angles: `(angles,)`.

    Returns:
        Points `(angles, 2)` and norms `(angles,)`.
    """
    u = kind.chart(start)
    turned = torch.stack([angles.cos() * u[0] - angles.sin() * u[1], angles.sin() * u[0] + angles.cos() * u[1]], 1)
    points = torch.func.vmap(kind.inverse)(turned)
    return points, torch.func.vmap(torch.func.grad(kind.value))(points).norm(dim=1)


class ChartRotation(Symmetry):
    r"""$SO(n)$ on the level sets of $|\varphi(x)|^2$, exact and transitive.

    $$x' = \varphi^{-1}(R\,\varphi(x)), \qquad \nabla' = J(x')^\top R\, J(x)^{-\top} \nabla,$$

    with $J$ the chart's Jacobian.

    Args:
        landscape: whose chart is used; read, not kept.

    Example:
        >>> ChartRotation(Booth()).group
        Orthogonal(2)

    Source: Zhao et al., NeurIPS 2022 (arXiv 2205.10637), and the code of its test functions.
    """

    kind = "chart rotation"
    exactness = "exact"
    parameters = ("x",)

    def __init__(self, landscape: Landscape) -> None:
        self.chart, self.inverse = landscape.chart, landscape.inverse
        self.group: Orthogonal = Orthogonal(landscape.x.shape[0])

    def act(self, element: Tensor, point: Point) -> Point:
        x = point.parameters["x"]
        arrived = self.inverse(element @ self.chart(x))
        return point.update({"x": arrived}, self._carry(element, point.gradients, x, arrived))

    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        x = point.parameters["x"]
        arrived = self.inverse(element @ self.chart(x))
        # The action is not linear: a momentum is carried by the derivative at x, a gradient exactly.
        return Carried(self._carry(element, covectors, x, arrived), exact=False)

    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        x = point.parameters["x"]
        matrix = self._matrix(element, x, self.inverse(element @ self.chart(x)))
        return Carried({"x": matrix.square() @ squares["x"]} if "x" in squares else {}, exact=False)

    def _carry(self, element: Tensor, covectors: Mapping[str, Tensor], x: Tensor, arrived: Tensor) -> dict[str, Tensor]:
        return {"x": self._matrix(element, x, arrived) @ covectors["x"]} if "x" in covectors else {}

    def _matrix(self, element: Tensor, x: Tensor, arrived: Tensor) -> Tensor:
        here, there = torch.func.jacrev(self.chart)(x), torch.func.jacrev(self.chart)(arrived)
        return there.mT @ element @ torch.linalg.inv(here).mT
