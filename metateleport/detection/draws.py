"""Random draws for certificates: group elements, weights, fresh inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.detection.given import mapped
from metateleport.groups import GeneralLinear, Group, unbound

__all__ = [
    "NearIdentity",
    "fresh_inputs",
    "is_wide",
    "random_element",
    "random_elements",
    "random_near_identity",
    "randomise",
    "seeded",
]


@dataclasses.dataclass(frozen=True)
class NearIdentity:
    r"""The matrix $1 + L R$ with $L$ of few columns, which is multiplied with others without being made.

    Args:
        left: $L$, `(k, r)`.
        right: $R$, `(r, k)`.

    Example:
        >>> element = NearIdentity(torch.ones(3, 1), torch.ones(1, 3))
        >>> bool(torch.equal(torch.eye(3) @ element, torch.eye(3) + 1))
        True
    """

    left: Tensor
    right: Tensor

    @property
    def mT(self) -> NearIdentity:
        """The transpose."""
        return NearIdentity(self.right.mT, self.left.mT)

    def __matmul__(self, matrix: Tensor) -> Tensor:
        return _added(matrix, self.left, self.right @ matrix)

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        return _added(matrix, matrix @ self.left, self.right)


def _added(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`matrix + left @ right`; of two matrices in one pass over the sum."""
    return torch.addmm(matrix, left, right) if matrix.ndim == left.ndim == right.ndim == 2 else matrix + left @ right


_WIDE = 128
_RANK = 32

_TOGETHER = 2**15
"""Largest number of entries of matrices whose exponentials are made side by side; more would leave the cache."""


def random_element(
    group: Group, size: float, source: torch.Generator, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    r"""An element whose generator has a given Frobenius norm, drawn on the CPU.

    Of a wide $GL(k)$ the generator is $Q T Q^\top$ with an orthonormal $Q$ of 32 columns: its exponential
    $1 + Q (e^T - 1) Q^\top$ is as dense as any other and costs $k^2$, not $k^3$.

    Args:
        group: the group.
        size: Frobenius norm of the generator.
        source: of the draw.
        dtype: of the result.
        device: of the result.

    Returns:
        One element, of the group's shape.

    Example:
        >>> from metateleport.groups import PositiveDiagonal
        >>> random_element(PositiveDiagonal(3), 0.5, torch.Generator().manual_seed(0), torch.float64).shape
        torch.Size([3])
    """
    return random_elements([group], size, [source], dtype, [device])[0]


def random_elements(
    groups: Sequence[Group],
    size: float,
    sources: Sequence[torch.Generator],
    dtype: torch.dtype,
    devices: Sequence[torch.device | None],
) -> list[Tensor]:
    """Elements of several groups, each as `random_element` draws it; exponentials of one size are made side by side.

    Example:
        >>> from metateleport.groups import Orthogonal
        >>> sources = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
        >>> one, other = random_elements([Orthogonal(3)] * 2, 0.5, sources, torch.float64, [None, None])
        >>> bool(torch.equal(one, other))
        True
    """
    found: dict[int, Tensor] = {}
    together: dict[Group, list[int]] = {}
    for place, (group, source) in enumerate(zip(groups, sources, strict=True)):
        if is_wide(group):
            update = random_near_identity(group, size, source, torch.float64)
            found[place] = update.left @ update.right
            found[place].diagonal().add_(1)
        elif len(group.shape) > 1:
            together.setdefault(group, []).append(place)
        else:
            drawn = torch.randn(group.shape, generator=source, dtype=torch.float64)
            found[place] = group.exp(drawn * size / drawn.norm())
    for group, places in together.items():
        some = max(1, _TOGETHER // group.size**2)
        for part in (places[start : start + some] for start in range(0, len(places), some)):
            square = (group.size, group.size)
            matrices = [torch.randn(square, generator=sources[each], dtype=torch.float64) for each in part]
            found |= zip(part, unbound(group.exp(group.directed(torch.stack(matrices), size))), strict=True)
    return [found[place].to(device=device, dtype=dtype) for place, device in enumerate(devices)]


def is_wide(group: Group) -> bool:
    """Whether elements of a group are drawn near the identity, as updates of low rank."""
    return type(group) is GeneralLinear and group.size > _WIDE


def random_near_identity(
    group: Group, size: float, source: torch.Generator, dtype: torch.dtype, device: torch.device | None = None
) -> NearIdentity:
    """The element that `random_element` gives of a wide group, without the matrix; arguments as there."""
    drawn = torch.randn(group.size, _RANK, generator=source, dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q
    small = GeneralLinear(_RANK).random(size=size, generator=source, dtype=torch.float64)
    left = basis @ (small - torch.eye(_RANK, dtype=torch.float64))
    return NearIdentity(left.to(device=device, dtype=dtype), basis.mT.to(device=device, dtype=dtype))


def randomise(model: nn.Module, scale: float, seed: int) -> None:
    """Overwrites all parameters, and the running statistics of norms, with random numbers.

    At special weights (zero biases, unit gains, an adapter whose factor is zero) a wrong action can look right; at
    random ones it cannot.

    Args:
        model: the model.
        scale: of weight matrices, relative to one over the root of the fan-in, and of vectors.
        seed: of the draw.
    """
    sources: dict[torch.device, torch.Generator] = {}

    def source(value: Tensor) -> torch.Generator:
        if value.device not in sources:
            sources[value.device] = torch.Generator(value.device).manual_seed(seed)
        return sources[value.device]

    with torch.no_grad():
        for parameter in model.parameters():
            if not (parameter.is_floating_point() or parameter.is_complex()):
                continue
            value = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            width = parameter.shape[1:].numel() if parameter.ndim > 1 else 4
            bound = scale * (3 / max(width, 1)) ** 0.5
            value.uniform_(-bound, bound, generator=source(value))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3, generator=source(buffer))
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=source(buffer))


def fresh_inputs(given: Any, seed: int, daring: int = 2, spread: float = 1.0) -> Any:
    """Fresh inputs of the same shapes and types.

    Real numbers are drawn with the mean and spread of the given ones. Integers (tokens, labels, lengths) are the given
    ones in another order, each column by itself, because other values may not be valid. Masks, constants and ordered
    integers (offsets, positions) stay.

    Args:
        given: a tensor, or containers of tensors.
        seed: of the draw.
        daring: 2 for the above; 1 to permute real numbers too instead of drawing them; 0 to keep integers as given.
        spread: of real numbers that are drawn, relative to those given.

    Example:
        >>> fresh_inputs({"tokens": torch.tensor([3, 9, 4, 4])}, seed=0)["tokens"].sort().values
        tensor([3, 4, 4, 9])
    """
    source = torch.Generator().manual_seed(7919 + seed)

    def reordered(value: Tensor) -> Tensor:
        dim = next((dim for dim, size in enumerate(value.shape) if size > 1), None)
        if dim is None:
            return value
        order = torch.rand(value.shape, generator=source).argsort(dim).to(value.device)
        return value.gather(dim, order)

    def fresh(value: Tensor) -> Tensor:
        if value.layout is not torch.strided or value.is_quantized or value.dtype is torch.bool or not value.numel():
            return value
        if value.is_complex():
            return reordered(value)
        low, high = value.min(), value.max()
        if bool(low == high) or bool(((value == low) | (value == high)).all() & (value.numel() > 2)):
            return value
        if value.is_floating_point():
            if daring < 2 or not bool(value.isfinite().all()):
                return reordered(value)
            drawn = torch.randn(value.shape, generator=source, dtype=torch.float64).to(value)
            return value.mean() + spread * value.std() * drawn
        return value if daring < 1 or _is_ordered(value) else reordered(value)

    return mapped(given, fresh)


def _is_ordered(value: Tensor) -> bool:
    """Whether a vector of integers is sorted, as offsets are and have to stay."""
    if value.ndim != 1:
        return False
    steps = value.long().diff()
    return bool((steps >= 0).all() or (steps <= 0).all())


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Seeds torch, numpy and Python inside the context, and restores their states: passes become comparable.

    Args:
        model: on whose devices is drawn.
        seed: of the draws.
    """
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    python, others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(others)
