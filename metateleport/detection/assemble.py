"""From classes of variables to symmetries: which variables mix, under which group, and of which kind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from metateleport.detection.parts import Parts
from metateleport.detection.walk import Walk
from metateleport.groups import GeneralLinear, Group, PositiveDiagonal
from metateleport.symmetries import LinearPair, Rescaling, Symmetry, Unsuitable
from metateleport.symmetries.attention import AttentionQK, AttentionVO
from metateleport.symmetries.axes import AxisSymmetry, Leg
from metateleport.symmetries.batch_norm import AfterBatchNorm, BeforeBatchNorm
from metateleport.symmetries.channel_rescaling import ChannelRescaling
from metateleport.symmetries.gated import GatedMLP
from metateleport.symmetries.layer_scale import LayerScale
from metateleport.symmetries.linear_chain import LinearChain
from metateleport.symmetries.lora import LoRAPair
from metateleport.symmetries.norm_gain import NormGain
from metateleport.symmetries.rotary import PlaneScaling
from metateleport.symmetries.translation import Absorber, BiasTranslation

__all__ = ["Candidate", "candidates"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A symmetry that the graph allows; its certificate decides whether it holds.

    Args:
        symmetry: the symmetry.
        place: sorts candidates in the order of the data flow.
        instead: makes the candidates to try if this one's certificate fails.
    """

    symmetry: Symmetry
    place: tuple[int, int]
    instead: Callable[[], Sequence[Candidate]] = tuple


def candidates(walk: Walk, model: nn.Module, frozen: bool = False) -> list[Candidate]:
    """All candidates of a walked graph, in the order of the data flow.

    Args:
        walk: the walked graph.
        model: the model.
        frozen: whether frozen parameters may move.
    """
    parts = Parts(walk.ledger, walk.classes)
    found: list[Candidate] = []
    for roots in parts.matrix_groups():
        found += _matrix_candidates(parts, roots, model, frozen)
    for roots in parts.diagonal_groups():
        found += _diagonal_candidates(parts, roots, model, frozen)
    return sorted(found, key=lambda candidate: candidate.place)


def _matrix_candidates(parts: Parts, roots: np.ndarray, model: nn.Module, frozen: bool) -> list[Candidate]:
    instead = functools.partial(_diagonal_candidates, parts, roots, model, frozen)
    legs = _matrix_legs(parts, roots)
    if legs is None:
        return instead()
    built = _build(parts, roots, _matrix_kind(parts, roots, legs), GeneralLinear(len(roots)), legs)
    symmetry: Symmetry = _as_pair(built, model, LinearPair, frozen) if type(built) is LinearChain else built
    if not _two_sided(legs):
        return []
    first = Candidate(symmetry, parts.place(roots), instead)
    return [first, *_translations(parts, roots, legs)]


def _matrix_kind(parts: Parts, roots: np.ndarray, legs: list[Leg]) -> type[AxisSymmetry]:
    if _is_adapter(legs):
        return LoRAPair
    if parts.tagged("attention", roots):
        return AttentionQK
    if parts.tagged("mixed by attention", roots):
        return AttentionVO
    return LinearChain


def _is_adapter(legs: list[Leg]) -> bool:
    return any("lora_" in leg.name for leg in legs)


def _matrix_legs(parts: Parts, roots: np.ndarray, planes: bool = False) -> list[Leg] | None:
    """Legs of a matrix group on some classes; None where the classes are not aligned with axes."""
    legs = []
    for slot in parts.slots_of(roots):
        found = _matrix_places(parts, roots, slot.variables, planes)
        if found is None:
            return None
        legs += [Leg(slot.name, places, axis, dual, slot.variance) for places, dual, axis in found]
    return legs


def _matrix_places(
    parts: Parts, roots: np.ndarray, variables: torch.Tensor, planes: bool
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


def _translations(parts: Parts, roots: np.ndarray, legs: list[Leg]) -> list[Candidate]:
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
    """Whether one leg undoes what another does."""
    return len({leg.dual for leg in legs}) == 2 or any(leg.variance is not None for leg in legs)


def _diagonal_candidates(parts: Parts, roots: np.ndarray, model: nn.Module, frozen: bool) -> list[Candidate]:
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
    kind, exactness = _diagonal_kind(parts, roots, legs)
    built = _build(parts, roots, kind, PositiveDiagonal(len(roots)), legs, exactness)
    symmetry: Symmetry = _as_pair(built, model, Rescaling, frozen) if kind is ChannelRescaling else built
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
    first = dataclasses.replace(found[0], instead=lambda: (plain,)) if len(found) == 1 else found[0]
    return [first, *found[1:]]


def _diagonal_kind(parts: Parts, roots: np.ndarray, legs: list[Leg]) -> tuple[type[AxisSymmetry], str]:
    if _is_adapter(legs):
        return LoRAPair, "exact"
    if parts.tagged("before batch norm, training", roots):
        return BeforeBatchNorm, "approximate"
    for tag, kind in (
        ("before batch norm", BeforeBatchNorm),
        ("attention", AttentionQK),
        ("mixed by attention", AttentionVO),
        ("batch norm", AfterBatchNorm),
        ("norm", NormGain),
        ("layer scale", LayerScale),
        ("gain", NormGain),
        ("product", GatedMLP),
    ):
        if parts.tagged(tag, roots):
            return kind, "exact"
    return ChannelRescaling, "exact"


def _build(
    parts: Parts,
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
    parts: Parts, roots: np.ndarray, labels: dict[str, torch.Tensor], group: Group, planes: bool
) -> list[Leg]:
    """How the inputs or outputs of a module move."""
    legs = []
    for name in parts.labelled(labels, roots):
        if parts.ledger.calls[name] > 1:
            continue
        label = labels[name]
        flat = label.numpy().reshape(-1)
        coordinates = parts.places(roots, flat)
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


def _as_pair(
    symmetry: AxisSymmetry, model: nn.Module, kind: type[LinearPair] | type[Rescaling], frozen: bool
) -> Symmetry:
    """The plain pair of two layers that a symmetry is, if it acts at the same places in the same way."""
    outputs, inputs = {leg.name for leg in symmetry.outputs}, {leg.name for leg in symmetry.inputs}
    if len(outputs) == 1 and len(inputs) == 1:
        with contextlib.suppress(Unsuitable):
            pair = kind(model, outputs.pop(), inputs.pop(), frozen=frozen)
            if pair.group == symmetry.group and _acts_as(symmetry, pair):
                return pair
    return symmetry


def _acts_as(symmetry: AxisSymmetry, pair: LinearPair | Rescaling) -> bool:
    """Whether the legs of a symmetry are those of a pair: unit i along the rows of the first layer and its bias, and
    in the second layer's columns as often as it is repeated there, one unit after the other."""
    if set(pair.parameters) != set(symmetry.parameters) or len(symmetry.legs) != len(pair.parameters):
        return False
    units = torch.arange(pair.width)
    for leg in symmetry.legs:
        taken_in = leg.name == pair.second_weight
        expected = units.repeat_interleave(pair.repeats if taken_in else 1)
        if leg.dual != taken_in or leg.variance is not None:
            return False
        if symmetry.is_diagonal:
            along = [dim for dim, size in enumerate(leg.places.shape) if size > 1] or [int(taken_in)]
            places = leg.places.reshape(-1)
        else:
            # Of a matrix group places say where a unit stands, of a diagonal one which unit stands there.
            along = [leg.axis]
            places = torch.empty_like(expected) if leg.places.numel() == expected.numel() else expected[:0]
            if places.numel():
                places[leg.places.reshape(-1)] = units.expand(leg.places.shape).reshape(-1)
        if along != [int(taken_in)] or not torch.equal(places, expected):
            return False
    return True
