"""The copy of the model that symmetries are certified on, with its inputs and reference outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metateleport.capture import modules_of, record
from metateleport.detection.draws import (
    NearIdentity,
    fresh_inputs,
    is_wide,
    random_elements,
    random_near_identity,
    randomise,
    seeded,
)
from metateleport.detection.given import copied, mapped, tensors_in
from metateleport.detection.trace import observables
from metateleport.point import Point
from metateleport.symmetries import BatchPair2024, Symmetry, Unsuitable
from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["OWN", "WIDE", "Stage", "Trial"]

OWN = 0.0
WIDE = "wide"
_SPREAD = 10.0
_LIMITS = {
    "exact": {torch.float64: 1e-10, torch.float32: 1e-4},
    "approximate": {torch.float64: 1e-2, torch.float32: 1e-2},
    "batch-exact": {torch.float64: 1e-6, torch.float32: 1e-2},
}
"""Largest relative drift of what is claimed, at elements of norm one."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial of a certificate: weights, the size of elements, and the inputs.

    Args:
        weights: scale of random weights; `OWN` stands for the model's own.
        size: Frobenius norm of the generators.
        seed: of weights, elements and fresh inputs.
        inputs: by exactness, `"given"`, `"fresh"` or both.
    """

    weights: float
    size: float
    seed: int
    inputs: Mapping[str, tuple[str, ...]]


class Stage:
    """A copy of the model, and its outputs before anything moves.

    Args:
        model: the model; it is not changed.
        inputs: positional inputs.
        keywords: keyword inputs.
        loss: maps the outputs to the quantity that must not change; the outputs themselves if not given.
        dtype: of the copy.
        everywhere: whether casts to another precision inside the model are replaced by this one.

    Raises:
        Unsuitable: if the model cannot be copied.
    """

    trial: Trial
    daring: int
    """How far fresh inputs are from those given, as in `fresh_inputs`; below zero they are those given."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        loss: Callable[[Any], Tensor] | None,
        dtype: torch.dtype,
        everywhere: bool = False,
    ) -> None:
        self.loss, self.dtype, self.daring, self.everywhere = loss, dtype, 2, everywhere
        self.given = (inputs, keywords)
        try:
            self.model = copy.deepcopy(model, _copies(model, dtype))
        except Exception as error:
            raise Unsuitable(
                f"{type(model).__name__} cannot be copied by copy.deepcopy ({type(error).__name__}: {error}), and "
                "symmetries are tried on a copy: keep what cannot be copied outside of the model while they are found"
            ) from error
        self.named = dict(self.model.named_parameters())
        self.tensors: dict[str, Tensor] = {**self.named, **dict(self.model.named_buffers())}
        self._inputs: dict[str, Any] = {}
        self._expected: dict[str, tuple[Tensor, ...]] = {}
        self._moved: list[tuple[Symmetry, Tensor]] = []
        self._activations: dict[str, Tensor] = {}
        self._narrow: dict[str, NearIdentity] = {}

    def prepare(self, trial: Trial) -> None:
        """Puts the weights of a trial in place.

        Args:
            trial: the first is at the model's own weights; random ones are not taken back.
        """
        self._moved.clear()
        if trial.weights != OWN:
            randomise(self.model, trial.weights, trial.seed)
        self.trial = trial
        self._inputs = {}
        self._expected = {}
        self._narrow = {}

    def expected(self, name: str) -> tuple[Tensor, ...]:
        """The outputs before anything moves, on the given or on fresh inputs; evaluated when first asked for."""
        if name not in self._expected:
            self._undo()
            self._expected[name] = self._outputs(name)
        return self._expected[name]

    def runs(self, name: str = "fresh") -> bool:
        """Whether the model runs on some inputs, with outputs as finite as on those given."""
        try:
            fresh = _not_finite(self.expected(name))
        except (RuntimeError, TypeError, ValueError, LookupError):
            return False
        return not fresh or fresh <= _not_finite(self.expected("given"))

    def measure(self, symmetries: Sequence[Symmetry], name: str) -> tuple[float, str]:
        """Moves along some symmetries at once, each by an element of its own.

        Args:
            symmetries: all of one exactness; of batch pairs, those whose `conditions` are met.
            name: of the inputs, `"given"`, `"fresh"`, or what begins with `"wide"`: fresh ones of a wider spread.

        Returns:
            The relative drift of the outputs, and why the symmetries do not hold; empty where they do.
        """
        expected = self.expected(name)
        self._undo()
        exactness = symmetries[0].exactness
        if exactness == "batch-exact":
            drift = _drift(expected, self._outputs(name, self._moved_on_batch(symmetries)))
        else:
            for symmetry, element in zip(symmetries, self._elements(symmetries), strict=True):
                self._move(symmetry, element)
                self._moved.append((symmetry, element))
            drift = _drift(expected, self._outputs(name))
        # Rounding grows with the condition number of the element.
        if drift <= _LIMITS[exactness][self.dtype] * (10.0 if self.trial.size > 1 else 1.0):
            return drift, ""
        where = "random weights" if self.trial.weights != OWN else "the model's weights"
        return drift, f"outputs drift by {drift:.1e} under an element of norm {self.trial.size:g} at {where}"

    def conditions(self, symmetries: Sequence[Symmetry]) -> list[bool]:
        """Whether the rank condition of each batch pair is met on the given inputs, before and after it moves."""
        if not symmetries:
            return []
        self._undo()
        with record(self.model, modules_of(symmetries)) as recording:
            self._expected["given"] = self._outputs("given")
        self._activations = recording.activations()
        point = self._point(symmetries)
        # The one without an element first: most that fail do so by their number of samples, which costs nothing.
        return [
            set(symmetry.modules).issubset(self._activations)
            and bool(symmetry.holds(point))
            and (not symmetry.holds_by_element or bool(symmetry.holds(point, self._element(symmetry))))
            for symmetry in symmetries
        ]

    def _moved_on_batch(self, symmetries: Sequence[Symmetry]) -> dict[str, Tensor]:
        """Parameters moved along batch pairs, the last in the data flow first: each finds its activations unchanged."""
        point = self._point(symmetries)
        for symmetry in reversed(symmetries):
            point = symmetry.act(self._element(symmetry), point)
        return point.parameters

    def _point(self, symmetries: Sequence[Symmetry]) -> Point:
        names = {name for symmetry in symmetries for name in symmetry.parameters}
        return Point({name: self.named[name] for name in names}, activations=self._activations)

    def _elements(self, symmetries: Sequence[Symmetry]) -> list[Tensor]:
        """A random element of each symmetry in this trial; the same at every call."""
        devices = [self._device(each) for each in symmetries]
        sources = [self._source(each) for each in symmetries]
        return random_elements([each.group for each in symmetries], self.trial.size, sources, self.dtype, devices)

    def _element(self, symmetry: Symmetry) -> Any:
        """As `_elements` gives it of one symmetry, or the factors of it that it can be multiplied by."""
        # The 2024 form only multiplies with the element.
        if not (isinstance(symmetry, BatchPair2024) and is_wide(symmetry.group)):
            return self._elements([symmetry])[0]
        # Two narrow matrices, which are asked for twice; kept until the next trial.
        if symmetry.key not in self._narrow:
            draw, device = random_near_identity, self._device(symmetry)
            self._narrow[symmetry.key] = draw(
                symmetry.group, self.trial.size, self._source(symmetry), self.dtype, device
            )
        return self._narrow[symmetry.key]

    def _source(self, symmetry: Symmetry) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(symmetry.key.encode()) + self.trial.seed)

    def _device(self, symmetry: Symmetry) -> torch.device:
        return self.tensors[symmetry.parameters[0]].device

    def _undo(self) -> None:
        """Moves back, up to rounding, which is far below the bounds."""
        for symmetry, element in reversed(self._moved):
            self._move(symmetry, symmetry.group.inverse(element))
        self._moved.clear()

    def _move(self, symmetry: Symmetry, element: Tensor) -> None:
        if isinstance(symmetry, AxisSymmetry):
            symmetry.overwrite(element, self.tensors)
            return
        names = (*symmetry.parameters, *symmetry.buffers)
        moved = symmetry.act(element, Point({name: self.tensors[name] for name in names}))
        for name in names:
            self.tensors[name].copy_(moved.parameters[name])

    def _outputs(self, name: str, instead: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The outputs on some inputs; with other parameters in the place of some."""
        if name not in self._inputs:
            given = name == "given" or self.daring < 0
            if name.startswith(WIDE):
                # Of one way among several that a model may take, the others are to be seen too.
                example = fresh_inputs(self.given, zlib.crc32(name.encode()) + self.trial.seed, 2, _SPREAD)
            else:
                example = self.given if given else fresh_inputs(self.given, self.trial.seed, self.daring)
            self._inputs[name] = _cast(example, self.dtype)
        # A model may overwrite what it is given.
        inputs, keywords = copied(self._inputs[name])
        # Buffers that the model writes, and random numbers that it draws, are the same in every pass.
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        precision = _InOnePrecision(self.dtype) if self.everywhere else contextlib.nullcontext()
        # Nothing requires a gradient but what the model itself differentiates by, as physics-informed networks do.
        with torch.enable_grad(), seeded(self.model, self.trial.seed), precision:
            outputs = torch.func.functional_call(self.model, {**buffers, **(instead or {})}, inputs, keywords)
            found = observables(outputs if self.loss is None else self.loss(outputs))
        return tuple(value.detach() for value in found)


class _InOnePrecision(TorchDispatchMode):
    """Casts to another floating-point precision go to one precision, so that the parts of a model fit together."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(kwargs.get("dtype"), "is_floating_point", False):
            kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)


def _not_finite(outputs: tuple[Tensor, ...]) -> int:
    return sum(int((~value.isfinite()).sum()) for value in outputs if value.is_floating_point() or value.is_complex())


def _copies(model: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """Tensors that a copy of the model shall have in the place of its own, by their identity.

    Parameters and buffers are copied into the dtype at once, so that there is no moment with two more copies. What a
    module computed from its parameters and keeps becomes a plain tensor: torch copies no graph.
    """
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(_as(parameter.detach(), dtype, copy=True), requires_grad=False)
    for buffer in model.buffers():
        copies[id(buffer)] = _as(buffer.detach(), dtype, copy=True)
    for module in model.modules():
        for held in vars(module).values():
            copies.update({id(each): each.detach().clone() for each in tensors_in(held) if not each.is_leaf})
    return copies


def _as(tensor: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """A tensor with its real and complex numbers in a precision."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex(), copy=copy)
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=copy)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return mapped(inputs, lambda value: _as(value.detach(), dtype))


def _drift(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    """The largest relative change of an output; infinite where one is not a number, or of another kind.

    What is infinite before (scores that a mask took out) has to be so afterwards.
    """
    worst = 0.0
    for old, new in zip(expected, found, strict=True):
        if not (old.is_floating_point() or old.is_complex()):
            if not torch.equal(old, new):
                return float("inf")
            continue
        old, new = (_as(value, torch.float64) for value in (old, new))  # noqa: PLW2901
        finite = old.isfinite()
        if not bool(finite.all()):
            if not torch.equal(old[~finite], new[~finite]):
                return float("inf")
            old, new = old[finite], new[finite]  # noqa: PLW2901
        scale = float(torch.linalg.vector_norm(old))
        change = float(torch.linalg.vector_norm(new - old))
        if not change < float("inf"):
            return float("inf")
        worst = max(worst, change / scale if scale > 0 else change)
    return worst
