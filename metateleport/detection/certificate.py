"""The certificate of a symmetry: how far outputs drift under random elements, where the weights are random too."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import point_of
from metateleport.detection.trace import observables
from metateleport.groups import Group
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["Certificate", "certify", "random_element", "randomise"]

EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
APPROXIMATE = 1e-2
"""Largest relative drift of what is claimed, at elements of norm one."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How far outputs moved under random elements of a symmetry.

    Args:
        drift: the largest relative change of the outputs, in the Frobenius norm, on inputs not used for finding; of a
            batch form on its batch.
        drift_given: the same on the example input.
        sizes: Frobenius norms of the generators drawn.
        weights: at how many sets of weights: the model's own, and random ones.
        dtype: what it was measured in.
        together: with how many symmetries at once it was moved.
        reason: why the symmetry was refused; empty where it holds.
    """

    drift: float
    drift_given: float
    sizes: tuple[float, ...]
    weights: int
    dtype: torch.dtype
    together: int = 1
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the symmetry passed."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Weights, inputs and the sizes of elements to try there."""

    weights: float
    seed: int
    fresh: bool
    sizes: tuple[float, ...]


# A scale of zero stands for the model's own weights. At random ones elements are large: what holds there holds.
_SETTINGS = (
    _Setting(0.0, 0, False, (0.3,)),
    _Setting(0.0, 1, True, (1.0,)),
    _Setting(1.5, 2, True, (3.0,)),
)


def certify(
    model: nn.Module,
    symmetries: Sequence[Symmetry],
    inputs: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> list[Certificate]:
    """Measures how far each of some symmetries moves the outputs.

    All are moved at once; where that fails they are halved until those that do not hold are found. So a drift is that
    of the largest set that passed together, which none of its members alone exceeds but by chance.

    Args:
        model: the model, in the mode (train or eval) that it shall be certified in; it is not changed.
        symmetries: those to certify.
        inputs: positional inputs.
        keywords: keyword inputs.
        loss: maps the outputs to what has to stay; the outputs themselves if not given.

    Returns:
        A certificate for each.

    Example:
        >>> from metateleport.symmetries import LinearPair
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> certify(model, [LinearPair(model, "0", "1")], (torch.ones(5, 3),))[0].holds
        True
    """
    keywords = keywords or {}
    if not symmetries:
        return []
    try:
        stage = _Stage(model, inputs, keywords, loss, torch.float64)
        stage.prepare(_SETTINGS[0])
    except (RuntimeError, TypeError, ValueError):
        # Some models run in the precision that they were made for only.
        stage = _Stage(model, inputs, keywords, loss, torch.float32)
        stage.prepare(_SETTINGS[0])
    return stage.certify_all(symmetries)


@dataclasses.dataclass
class _Record:
    """What was measured of one symmetry so far."""

    drift: dict[bool, float] = dataclasses.field(default_factory=lambda: {False: 0.0, True: 0.0})
    fresh: bool = False
    sizes: set[float] = dataclasses.field(default_factory=set)
    weights: set[float] = dataclasses.field(default_factory=set)
    together: int = 1
    reason: str = ""

    def add(self, setting: _Setting, drift: float, reason: str, together: int) -> None:
        self.drift[setting.fresh] = max(self.drift[setting.fresh], drift)
        self.fresh = self.fresh or setting.fresh
        self.sizes.update(setting.sizes)
        self.weights.add(setting.weights)
        self.together = max(self.together, together)
        self.reason = reason

    def certificate(self, dtype: torch.dtype) -> Certificate:
        sizes = tuple(sorted(self.sizes))
        return Certificate(
            self.drift[True] if self.fresh else self.drift[False],
            self.drift[False],
            sizes,
            len(self.weights),
            dtype,
            self.together,
            self.reason,
        )


class _Stage:
    """A copy of the model, and the outputs that it has to keep where it stands."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        loss: Callable[[Any], Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.loss, self.dtype = loss, dtype
        self.given = _cast((inputs, keywords), dtype)
        self.model = copy.deepcopy(model, _copies(model, dtype))
        self.named = dict(self.model.named_parameters())
        self.tensors: dict[str, Tensor] = {**self.named, **dict(self.model.named_buffers())}
        self.expected: tuple[Tensor, ...] = ()
        self.prepared: _Setting | None = None

    def prepare(self, setting: _Setting) -> None:
        """Puts the weights of a setting in place, and notes the outputs there."""
        if setting == self.prepared:
            return
        # Each element was undone, so that the model still has its own weights where it had them.
        if setting.weights:
            randomise(self.model, setting.weights, setting.seed)
        self.prepared = setting
        self.expected = self._outputs(setting)

    def certify_all(self, symmetries: Sequence[Symmetry]) -> list[Certificate]:
        """A certificate for each symmetry."""
        records = [_Record() for _ in symmetries]
        for setting in _SETTINGS:
            self.prepare(setting)
            for exactness in ("exact", "approximate"):
                if exactness == "approximate" and setting.weights:
                    continue
                chosen = [
                    i for i, each in enumerate(symmetries) if each.exactness == exactness and not records[i].reason
                ]
                self._halve(symmetries, chosen, setting, records)
            if not setting.fresh or setting.weights:
                for i, each in enumerate(symmetries):
                    if each.exactness == "batch-exact" and not records[i].reason:
                        self._measure_on_batch(each, setting, records[i])
        return [record.certificate(self.dtype) for record in records]

    def _halve(
        self, symmetries: Sequence[Symmetry], chosen: list[int], setting: _Setting, records: list[_Record]
    ) -> None:
        if not chosen:
            return
        worst, reason = self._measure([symmetries[i] for i in chosen], setting)
        if reason and len(chosen) > 1:
            middle = len(chosen) // 2
            self._halve(symmetries, chosen[:middle], setting, records)
            self._halve(symmetries, chosen[middle:], setting, records)
            return
        for i in chosen:
            records[i].add(setting, worst, reason, len(chosen))

    def _measure(self, symmetries: Sequence[Symmetry], setting: _Setting) -> tuple[float, str]:
        """The largest drift, and why the symmetries do not hold together."""
        exact = symmetries[0].exactness == "exact"
        worst = 0.0
        for number, size in enumerate(setting.sizes):
            source = torch.Generator().manual_seed(1000 * setting.seed + number)
            elements = [self._element(symmetry, size, source) for symmetry in symmetries]
            for symmetry, element in zip(symmetries, elements, strict=True):
                self._move(symmetry, element)
            drift = _drift(self.expected, self._outputs(setting))
            # Undone to rounding, which is far below what is asked for.
            for symmetry, element in zip(reversed(symmetries), reversed(elements), strict=True):
                self._move(symmetry, symmetry.group.inverse(element))
            # Rounding grows with the condition number of the element.
            limit = (EXACT[self.dtype] if exact else APPROXIMATE) * (10.0 if size > 1 else 1.0)
            if not drift <= limit:
                where = "random weights" if setting.weights else "the model's weights"
                return worst, f"outputs drift by {drift:.1e} under an element of norm {size:g} at {where}"
            worst = max(worst, drift)
        return worst, ""

    def _measure_on_batch(self, symmetry: Symmetry, setting: _Setting, record: _Record) -> None:
        """Moves along a batch form, by an element of norm one, on the inputs given; elsewhere it need not hold."""
        inputs, keywords = self.given
        here = dataclasses.replace(setting, fresh=False)
        expected = self._outputs(here)
        point, _ = point_of(self.model, [symmetry], inputs, keywords)
        element = self._element(symmetry, 1.0, torch.Generator().manual_seed(setting.seed))
        if not bool(symmetry.holds(point) & symmetry.holds(point, element)):
            record.add(here, 0.0, "there are more samples than its layers are wide, or some depend on others", 1)
            return
        moved = symmetry.act(element, point)
        for name in symmetry.parameters:
            self.tensors[name].copy_(moved.parameters[name])
        drift = _drift(expected, self._outputs(here))
        for name in symmetry.parameters:
            self.tensors[name].copy_(point.parameters[name])
        # A batch form solves a linear system, which costs digits.
        held = drift <= 1e4 * EXACT[self.dtype]
        record.add(
            here, drift, "" if held else f"outputs on the batch drift by {drift:.1e} under an element of norm 1", 1
        )

    def _element(self, symmetry: Symmetry, size: float, source: torch.Generator) -> Tensor:
        return random_element(symmetry.group, size, source, self.dtype, next(iter(self.named.values())).device)

    def _move(self, symmetry: Symmetry, element: Tensor) -> None:
        if isinstance(symmetry, AxisSymmetry):
            symmetry.overwrite(element, self.tensors)
            return
        names = (*symmetry.parameters, *symmetry.buffers)
        moved = symmetry.act(element, Point({name: self.tensors[name] for name in names}))
        for name in names:
            self.tensors[name].copy_(moved.parameters[name])

    def _outputs(self, setting: _Setting) -> tuple[Tensor, ...]:
        inputs, keywords = fresh_inputs(self.given, setting.seed) if setting.fresh else self.given
        # Buffers that the model writes, and random numbers that it draws, are the same in every pass.
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        with torch.no_grad(), _seeded(self.model):
            outputs = torch.func.functional_call(self.model, buffers, inputs, keywords)
            return observables(outputs if self.loss is None else self.loss(outputs))


def _copies(model: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """Tensors that a copy of the model shall have in the place of its own, by their identity.

    Parameters and buffers are copied into the dtype at once, so that there is no moment with two more copies. What a
    module computed from its parameters and keeps becomes a plain tensor: torch copies no graph.
    """
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        kept = (
            parameter.detach().clone() if not parameter.is_floating_point() else parameter.detach().to(dtype, copy=True)
        )
        copies[id(parameter)] = nn.Parameter(kept, requires_grad=False)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.detach().to(dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                copies[id(value)] = value.detach().clone()
    return copies


def random_element(
    group: Group, size: float, source: torch.Generator, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """An element whose generator has a given Frobenius norm, drawn on the CPU.

    Example:
        >>> from metateleport.groups import PositiveDiagonal
        >>> random_element(PositiveDiagonal(3), 0.5, torch.Generator().manual_seed(0), torch.float64).shape
        torch.Size([3])
    """
    if len(group.shape) > 1:
        return group.random(size=size, generator=source, dtype=torch.float64).to(device=device, dtype=dtype)
    drawn = torch.randn(group.shape, generator=source, dtype=torch.float64)
    return group.exp(drawn * size / drawn.norm()).to(device=device, dtype=dtype)


def randomise(model: nn.Module, scale: float, seed: int) -> None:
    """Overwrites all parameters, and the running statistics of norms, with random numbers.

    Zero biases, unit gains and a zero factor of an adapter make wrong actions look right; no random point does.

    Args:
        model: the model.
        scale: of weight matrices, relative to one over the root of what a unit takes in, and of vectors.
        seed: of the draw.
    """
    sources: dict[torch.device, torch.Generator] = {}

    def source(value: Tensor) -> torch.Generator:
        if value.device not in sources:
            sources[value.device] = torch.Generator(value.device).manual_seed(seed)
        return sources[value.device]

    with torch.no_grad():
        for value in model.parameters():
            if value.is_floating_point():
                width = value.shape[1:].numel() if value.ndim > 1 else 4
                bound = scale * (3 / max(width, 1)) ** 0.5
                value.uniform_(-bound, bound, generator=source(value))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3, generator=source(buffer))
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=source(buffer))


def fresh_inputs(given: Any, seed: int) -> Any:
    """Inputs of the same shapes and types that were never seen: numbers of the same mean and spread, indices within
    the range of those given; masks and constants stay."""
    source = torch.Generator().manual_seed(7919 + seed)

    def fresh(value: Tensor) -> Tensor:
        if value.dtype is torch.bool or not value.numel():
            return value
        low, high = value.min(), value.max()
        if bool(low == high) or bool(((value == low) | (value == high)).all() & (value.numel() > 2)):
            return value
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=source, dtype=torch.float64).to(value)
            return value.mean() + value.std() * drawn
        if value.is_complex():
            return value
        return torch.randint(int(low), int(high) + 1, value.shape, generator=source, dtype=value.dtype).to(value.device)

    return _mapped(given, fresh)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return _mapped(inputs, lambda value: value.detach().to(dtype) if value.is_floating_point() else value.detach())


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, function, value)


def _drift(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    """The largest relative change of an output; infinite where one is not finite or not of the same kind."""
    worst = 0.0
    for old, new in zip(expected, found, strict=True):
        if not old.is_floating_point():
            if not torch.equal(old, new):
                return float("inf")
            continue
        scale = float(torch.linalg.vector_norm(old.double()))
        change = float(torch.linalg.vector_norm(new.double() - old.double()))
        if not change < float("inf"):
            return float("inf")
        worst = max(worst, change / scale if scale > 0 else change)
    return worst


@contextlib.contextmanager
def _seeded(model: nn.Module) -> Iterator[None]:
    devices = {value.device for value in model.parameters() if value.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
