"""From classes of variables to symmetries: what may mix, under which group, and of which kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from metateleport.detection.ledger import Classes, Ledger, Slot
from metateleport.detection.walk import Walk
from metateleport.groups import GeneralLinear, Group, PositiveDiagonal
from metateleport.symmetries import LinearPair, Rescaling, Symmetry, Unsuitable
from metateleport.symmetries.attention import AttentionQK, AttentionVO
from metateleport.symmetries.axes import AxisSymmetry, Leg
from metateleport.symmetries.batch_norm import AfterBatchNorm, BeforeBatchNorm
from metateleport.symmetries.channel_rescaling import ChannelRescaling
from metateleport.symmetries.gated import GatedMLP
from metateleport.symmetries.linear_chain import LinearChain
from metateleport.symmetries.lora import LoRAPair
from metateleport.symmetries.norm_gain import NormGain
from metateleport.symmetries.rotary import PlaneScaling
from metateleport.symmetries.translation import Absorber, BiasTranslation

__all__ = ["Candidate", "candidates"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A symmetry that the graph speaks for; the certificate decides.

    Args:
        symmetry: the symmetry.
        place: what puts candidates in the order of the data flow.
        instead: what to try where the certificate refuses it.
    """

    symmetry: Symmetry
    place: tuple[int, int]
    instead: tuple[Candidate, ...] = ()


def candidates(walk: Walk, model: nn.Module) -> list[Candidate]:
    """All candidates of a walked graph, in the order of the data flow."""
    parts = _Parts(walk.ledger, walk.classes)
    found: list[Candidate] = []
    for roots in parts.matrix_groups():
        found += _matrix_candidates(parts, roots, model)
    for roots in parts.diagonal_groups():
        found += _diagonal_candidates(parts, roots, model)
    return sorted(found, key=lambda candidate: candidate.place)


class _Parts:
    """The classes that may move, and how they fall into groups."""

    def __init__(self, ledger: Ledger, classes: Classes) -> None:
        self.ledger, self.classes = ledger, classes
        self.slots = sorted(ledger.slots.values(), key=lambda slot: ledger.first_use.get(slot.name, 0))
        count = ledger.size
        coarse, fine, loose = (np.zeros(count, np.uint64) for _ in range(3))

        def touch(operation: int, variables: np.ndarray, fibers: np.ndarray, scales: bool = False) -> None:
            alive = ~classes.dead[variables]
            roots, fibers = classes.root[variables[alive]], fibers[alive]
            np.add.at(coarse, roots, _mixed(np.full(len(roots), operation), np.zeros(len(roots), np.int64)))
            hashes = _mixed(np.full(len(roots), operation), fibers)
            np.add.at(fine, roots, hashes)
            if not scales:
                np.add.at(loose, roots, hashes)

        for operation, variables, fibers, scales in ledger.touches:
            touch(operation, variables, fibers, scales)
        for number, slot in enumerate(ledger.slots.values()):
            flat = slot.variables.numpy().reshape(-1)
            touch(-1 - number, flat, np.zeros(len(flat), np.int64))
        self.coarse, self.fine, self.loose = coarse, fine, loose
        self.diagonal = np.zeros(count, bool)
        for variables in ledger.diagonal:
            self.diagonal[classes.root[variables]] = True
        self.tags = {name: self._roots(np.concatenate(parts)) for name, parts in ledger.tags.items()}
        movable = [slot for slot in ledger.slots.values() if not _is_buffer(ledger, slot)]
        every = [slot.variables.numpy().reshape(-1) for slot in movable]
        alive = np.concatenate(every) if every else np.zeros(0, np.int64)
        self.roots = np.unique(classes.root[alive[~classes.dead[alive]]])
        self.by_root: dict[int, list[int]] = {}
        for number, slot in enumerate(self.slots):
            flat = slot.variables.numpy().reshape(-1)
            for root in np.unique(classes.root[flat[~classes.dead[flat]]]).tolist():
                self.by_root.setdefault(root, []).append(number)
        # What comes first in the data flow moves by the element itself, what undoes it by the inverse.
        self.orientation = np.zeros(count, np.int64)
        self.order = np.zeros(count, np.int64)
        for slot in reversed(self.slots):
            flat = slot.variables.numpy().reshape(-1)[::-1]
            self.orientation[classes.root[flat]] = classes.sign[flat]
            self.order[classes.root[flat]] = ledger.first_use.get(slot.name, 0)

    def _roots(self, variables: np.ndarray) -> frozenset[int]:
        return frozenset(self.classes.root[variables[~self.classes.dead[variables]]].tolist())

    def tagged(self, name: str, roots: np.ndarray) -> bool:
        """Whether the first of some classes passes an operation of that name."""
        return int(roots[0]) in self.tags.get(name, ())

    def matrix_groups(self) -> Iterator[np.ndarray]:
        """Classes that all operations treat alike and that no operation treats one by one."""
        yield from (roots for roots in _split(self.roots[~self.diagonal[self.roots]], self.fine) if len(roots) > 1)

    def diagonal_groups(self) -> Iterator[np.ndarray]:
        """Classes that some operation treats one by one, or that nothing may mix with."""
        alone = [roots for roots in _split(self.roots[~self.diagonal[self.roots]], self.fine) if len(roots) == 1]
        rest = np.concatenate([self.roots[self.diagonal[self.roots]], *alone])
        yield from _split(np.sort(rest), self.coarse)

    def heads(self, roots: np.ndarray) -> list[np.ndarray]:
        """Classes split by what may mix with one another, but for operations that scale each by a fixed number."""
        return list(_split(roots, self.loose))

    def places(self, roots: np.ndarray, variables: np.ndarray) -> np.ndarray:
        """The coordinate of each variable among some classes, -1 where it is of another."""
        found = np.searchsorted(roots, self.classes.root[variables])
        found = np.minimum(found, len(roots) - 1)
        match = (roots[found] == self.classes.root[variables]) & ~self.classes.dead[variables]
        return np.where(match, found, -1)

    def slots_of(self, roots: np.ndarray) -> list[Slot]:
        """The slots that some classes stand in, in the order of the data flow."""
        numbers = {number for root in roots.tolist() for number in self.by_root.get(root, ())}
        return [self.slots[number] for number in sorted(numbers)]

    def signs(self, variables: np.ndarray) -> np.ndarray:
        """The sign of each variable, the first of its class in the data flow counting as positive."""
        return self.classes.sign[variables] * self.orientation[self.classes.root[variables]]

    def place(self, roots: np.ndarray) -> tuple[int, int]:
        """By what a group of classes is put in the order of the data flow."""
        return int(self.order[roots[0]]), int(roots[0])


def _is_buffer(ledger: Ledger, slot: Slot) -> bool:
    return (slot.name, "buffer") in ledger.slots and ledger.slots[(slot.name, "buffer")] is slot


def _mixed(operation: np.ndarray, fiber: np.ndarray) -> np.ndarray:
    """A hash of each pair, so that sums of them tell collections of pairs apart (splitmix64)."""
    with np.errstate(over="ignore"):
        value = operation.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + fiber.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
        return value ^ (value >> np.uint64(31))


def _split(roots: np.ndarray, key: np.ndarray) -> Iterator[np.ndarray]:
    """Sorted classes, split by a key, in the order of their first members."""
    groups: dict[int, list[int]] = {}
    for root, value in zip(roots.tolist(), key[roots].tolist(), strict=True):
        groups.setdefault(value, []).append(root)
    yield from (np.array(group, dtype=np.int64) for group in groups.values())


def _matrix_candidates(parts: _Parts, roots: np.ndarray, model: nn.Module) -> list[Candidate]:
    instead = tuple(_diagonal_candidates(parts, roots, model))
    legs = _matrix_legs(parts, roots)
    if legs is None:
        return list(instead)
    built = _build(parts, roots, _matrix_kind(parts, roots, legs), GeneralLinear(len(roots)), legs)
    symmetry: Symmetry = _as_pair(built, model, LinearPair) if type(built) is LinearChain else built
    if not _two_sided(legs):
        return []
    first = Candidate(symmetry, parts.place(roots), instead)
    return [first, *_translations(parts, roots, legs)]


def _matrix_kind(parts: _Parts, roots: np.ndarray, legs: list[Leg]) -> type[AxisSymmetry]:
    if any("lora_" in leg.name for leg in legs):
        return LoRAPair
    if parts.tagged("attention", roots):
        return AttentionQK
    if parts.tagged("mixed by attention", roots):
        return AttentionVO
    return LinearChain


def _matrix_legs(parts: _Parts, roots: np.ndarray, planes: bool = False) -> list[Leg] | None:
    """Legs of a matrix group on some classes; None where they do not stand along axes as such a group needs."""
    legs = []
    for slot in parts.slots_of(roots):
        found = _matrix_places(parts, roots, slot.variables, planes)
        if found is None:
            return None
        legs += [Leg(slot.name, places, axis, dual, slot.variance) for places, dual, axis in found]
    return legs


def _matrix_places(
    parts: _Parts, roots: np.ndarray, variables: torch.Tensor, planes: bool
) -> list[tuple[torch.Tensor, bool, int]] | None:
    """Where the coordinates of a matrix group stand, whether by the inverse, and along which axis."""
    flat = variables.numpy().reshape(-1)
    coordinates, signs = parts.places(roots, flat), parts.signs(flat)
    along = [dim for dim in range(variables.ndim) if variables.shape[dim] > 1]
    found = []
    for dual in (False, True):
        where = np.flatnonzero((coordinates >= 0) & ((signs < 0) == dual))
        if not len(where):
            continue
        counts = np.bincount(coordinates[where], minlength=len(roots))
        if len(along) != 1 or (counts != counts[0]).any():
            return None
        order = where[np.argsort(coordinates[where], kind="stable")].reshape(len(roots), -1)
        if planes:
            # Each class is a plane: the first of its two places is one coordinate, the second the other.
            if order.shape[1] % 2:
                return None
            pairs = order.reshape(len(roots), -1, 2)
            order = np.concatenate([pairs[..., 0], pairs[..., 1]])
        found.append((torch.from_numpy(order.T.copy()), dual, along[0]))
    return found


def _translations(parts: _Parts, roots: np.ndarray, legs: list[Leg]) -> list[Candidate]:
    """Translations of a bias among the legs of a matrix group."""

    def is_bias(leg: Leg) -> bool:
        return any(slot.name == leg.name and slot.variables.ndim == 1 for slot in parts.slots_of(roots))

    biases = {dual: [leg for leg in legs if leg.dual == dual and is_bias(leg)] for dual in (False, True)}
    if parts.tagged("attention", roots):
        free = [BiasTranslation(leg) for leg in biases[True] if leg.places.shape[0] == 1]
    else:
        weights = [leg for leg in legs if leg.dual and not is_bias(leg)]
        if not biases[False] or not weights or any(leg.name not in parts.ledger.affine for leg in weights):
            return []
        absorbers = [_absorber(leg, *parts.ledger.affine[leg.name]) for leg in weights]
        inputs = _module_legs(parts, roots, parts.ledger.inputs, GeneralLinear(len(roots)), False)
        free = [BiasTranslation(leg, absorbers, inputs) for leg in biases[False][:1] if leg.places.shape[0] == 1]
    return [Candidate(each, parts.place(roots)) for each in free]


def _absorber(leg: Leg, bias: str, out_axis: int) -> Absorber:
    return Absorber(leg.name, bias, leg.places, leg.axis, out_axis)


def _two_sided(legs: list[Leg]) -> bool:
    """Whether the action stands between something: one leg undoes what another does."""
    return len({leg.dual for leg in legs}) == 2 or any(leg.variance is not None for leg in legs)


def _diagonal_candidates(parts: _Parts, roots: np.ndarray, model: nn.Module) -> list[Candidate]:
    legs = []
    for slot in parts.slots_of(roots):
        flat = slot.variables.numpy().reshape(-1)
        coordinates = parts.places(roots, flat)
        if not (coordinates >= 0).any():
            continue
        signs = parts.signs(flat)
        for dual in (False, True):
            chosen = np.where((signs < 0) == dual, coordinates, -1)
            if (chosen >= 0).any():
                places = torch.from_numpy(chosen).reshape(slot.variables.shape)
                legs.append(Leg(slot.name, places, 0, dual, slot.variance))
    if not _two_sided(legs):
        return []
    kind, exactness = _diagonal_kind(parts, roots)
    built = _build(parts, roots, kind, PositiveDiagonal(len(roots)), legs, exactness)
    symmetry: Symmetry = _as_pair(built, model, Rescaling) if kind is ChannelRescaling else built
    plain = Candidate(symmetry, parts.place(roots))
    if not parts.tagged("attention", roots):
        return [plain]
    found = []
    for plane in parts.heads(roots):
        turning = _matrix_legs(parts, plane, planes=True)
        if turning is None or not _two_sided(turning):
            return [plain]
        group = PlaneScaling(2 * len(plane))
        turned = _build(parts, plane, AttentionQK, group, turning, planes=True)
        found.append(Candidate(turned, parts.place(plane)))
    first = dataclasses.replace(found[0], instead=(plain,)) if len(found) == 1 else found[0]
    return [first, *found[1:]]


def _diagonal_kind(parts: _Parts, roots: np.ndarray) -> tuple[type[AxisSymmetry], str]:
    if parts.tagged("before batch norm, training", roots):
        return BeforeBatchNorm, "approximate"
    for tag, kind in (
        ("before batch norm", BeforeBatchNorm),
        ("attention", AttentionQK),
        ("mixed by attention", AttentionVO),
        ("batch norm", AfterBatchNorm),
        ("norm", NormGain),
        ("gain", NormGain),
        ("product", GatedMLP),
    ):
        if parts.tagged(tag, roots):
            return kind, "exact"
    return ChannelRescaling, "exact"


def _build(
    parts: _Parts,
    roots: np.ndarray,
    kind: type[AxisSymmetry],
    group: Group,
    legs: list[Leg],
    exactness: str = "exact",
    planes: bool = False,
) -> AxisSymmetry:
    inputs = _module_legs(parts, roots, parts.ledger.inputs, group, planes)
    outputs = _module_legs(parts, roots, parts.ledger.outputs, group, planes)
    buffers = [leg.name for leg in legs if (leg.name, "buffer") in parts.ledger.slots]
    return kind(group, legs, inputs, outputs, buffers, exactness)


def _module_legs(
    parts: _Parts, roots: np.ndarray, labels: dict[str, torch.Tensor], group: Group, planes: bool
) -> list[Leg]:
    """Where the features that a module takes in or puts out move."""
    legs = []
    for name, label in labels.items():
        if parts.ledger.calls[name] > 1:
            continue
        flat = label.numpy().reshape(-1)
        coordinates = parts.places(roots, flat)
        if not (coordinates >= 0).any():
            continue
        signs = parts.signs(flat)
        if len(group.shape) == 1:
            for dual in (False, True):
                chosen = np.where((signs < 0) == dual, coordinates, -1)
                if (chosen >= 0).any():
                    legs.append(Leg(name, torch.from_numpy(chosen), -1, dual))
            continue
        found = _matrix_places(parts, roots, label, planes)
        legs += [Leg(name, places, -1, dual) for places, dual, _ in found or ()]
    return legs


def _as_pair(symmetry: AxisSymmetry, model: nn.Module, kind: type[LinearPair] | type[Rescaling]) -> Symmetry:
    """The plain pair of two layers that a symmetry is, if it is one."""
    outputs, inputs = {leg.name for leg in symmetry.outputs}, {leg.name for leg in symmetry.inputs}
    if len(outputs) == 1 and len(inputs) == 1:
        with contextlib.suppress(Unsuitable):
            pair = kind(model, *outputs, *inputs)
            if set(pair.parameters) == set(symmetry.parameters) and pair.group == symmetry.group:
                return pair
    return symmetry
