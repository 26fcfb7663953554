"""The infinitesimal action of symmetries: a vector field on the parameters for each generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metateleport.groups import Group, VectorGroup
from metateleport.point import Point
from metateleport.symmetries import Symmetry

__all__ = ["algebra_basis", "fields", "flatten", "unflatten"]


def algebra_basis(group: Group) -> Tensor:
    """An orthonormal basis of a Lie algebra, `(dimension, *group.shape)` in float64.

    Raises:
        ValueError: if the group's projections do not span as many dimensions as it says.

    Example:
        >>> from metateleport.groups import Orthogonal
        >>> algebra_basis(Orthogonal(3)).shape
        torch.Size([3, 3, 3])
    """
    units = torch.eye(group.size**2, dtype=torch.float64).reshape(-1, group.size, group.size)
    if isinstance(group, VectorGroup):
        units = torch.diag_embed(torch.eye(group.size, dtype=torch.float64))
    spanned = group.project(units).flatten(1)
    _, singular, rows = torch.linalg.svd(spanned, full_matrices=False)
    rank = int((singular > 1e-9).sum())
    if rank != group.dimension:
        raise ValueError(f"{group} says its dimension is {group.dimension}, and its generators span {rank}")
    return rows[:rank].reshape(rank, *group.shape)


def fields(symmetries: Sequence[Symmetry], point: Point, names: Sequence[str]) -> Tensor:
    r"""The velocities $\frac{d}{dt} \exp(tE_i) \cdot w$ at $t = 0$ for a basis $E_i$ of each symmetry's Lie algebra.

    Args:
        symmetries: those that act, each on its own.
        point: $w$, without batch dimensions; its gradients are not looked at.
        names: of the parameters to read velocities of; those that a symmetry leaves alone have none.

    Returns:
        `(sum of dimensions, number of parameters)`, the parameters flattened in the order of `names`.

    Example:
        >>> from metateleport.symmetries import QuadraticRotation
        >>> model = torch.nn.Module()
        >>> model.x = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
        >>> circle = Point({"x": model.x.detach()}, activations={"": torch.eye(2, dtype=torch.float64)})
        >>> fields([QuadraticRotation(model)], circle, ["x"]).abs()
        tensor([[0.0000, 0.7071]], dtype=torch.float64)
    """
    start = point.replace(gradients={}, cotangents={}, pullback=None)
    rows = []
    for symmetry in symmetries:
        moved = [name for name in symmetry.parameters if name in names]

        def arrived(
            generator: Tensor, symmetry: Symmetry = symmetry, moved: Sequence[str] = moved
        ) -> dict[str, Tensor]:
            there = symmetry.act(symmetry.group.exp(generator), start)
            return {name: there.parameters[name] for name in moved}

        like = start.parameters[symmetry.parameters[0]]
        basis = algebra_basis(symmetry.group).to(like)
        origin = torch.zeros_like(basis[0])
        velocity = torch.func.vmap(
            lambda direction, arrived=arrived, origin=origin: torch.func.jvp(arrived, (origin,), (direction,))[1]
        )(basis)
        still = {name: value.new_zeros(len(basis), *value.shape) for name, value in start.parameters.items()}
        rows.append(torch.cat([velocity.get(name, still[name]).flatten(1) for name in names], 1))
    return torch.cat(rows) if rows else next(iter(start.parameters.values())).new_zeros(0, _count(start, names))


def flatten(parameters: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named parameters as one vector."""
    return torch.cat([parameters[name].flatten() for name in names])


def unflatten(vector: Tensor, like: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The inverse of `flatten`, with shapes taken from `like`."""
    pieces = vector.split([like[name].numel() for name in names])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)}


def _count(point: Point, names: Sequence[str]) -> int:
    return sum(point.parameters[name].numel() for name in names)
