"""The factors of a model's products that an optimizer steps in gauges."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from metateleport.detection import exact_symmetries
from metateleport.detection.adapters import adapter_pairs, told_symmetries
from metateleport.gauges import FactorPair, factor_pairs
from metateleport.gauges.factors import FactorSide
from metateleport.gauges.whitened import SIDES, rows_of
from metateleport.point import Tensors
from metateleport.symmetries import Symmetry, Unsuitable

__all__ = ["Factors", "known_factors"]

_NOT_SERVED = {"lora_E": "AdaLoRA", "vera_lambda_b": "VeRA"}
"""What tells adapters that have no group of their own, by a part of their parameters' names."""


class Factors:
    """The pairs of factors of a model, their tensors, and on which factor of each pair the floor of its gauge is.

    The floor is on the factor that starts at zero, or has more entries than the other. It is decided at the first step,
    when the weights that training starts from are there, and saved with the optimizer.

    Args:
        model: whose factors they are, or None.
        pairs: of the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> factors = Factors(model, factor_pairs(told_symmetries(model)))
        >>> sorted(factors.tensors), factors.rows(factors.pairs[0], "out")
        (['0.bias', '0.weight', '1.weight'], 4)
    """

    def __init__(self, model: nn.Module | None, pairs: Sequence[FactorPair]) -> None:
        self.model = model
        self.pairs: tuple[FactorPair, ...] = ()
        self.tensors: Tensors = {}
        self.whole: dict[str, bool] = {}
        self._swapped: list[bool] = []
        self.add(pairs)

    def add(self, pairs: Sequence[FactorPair]) -> None:
        """Takes up pairs, behind those that are there already."""
        self.pairs += tuple(pairs)
        if self.model is not None and pairs:
            named = dict(self.model.named_parameters(remove_duplicate=False))
            names = {name for pair in self.pairs for side in SIDES for name in pair.names(side)}
            self.tensors = {name: named[name] for name in sorted(names)}
            self.whole = self._covered()

    def new_pairs(self, added: Collection[int]) -> tuple[FactorPair, ...]:
        """Adapters that some of the added tensors (given by `id`) belong to, and no pair that is here does."""
        if self.model is None:
            return ()
        named = dict(self.model.named_parameters(remove_duplicate=False))
        found = factor_pairs(adapter_pairs(self.model, frozen=True))
        names = [{name for side in SIDES for name in pair.names(side)} for pair in found]
        return tuple(
            pair
            for pair, own in zip(found, names, strict=True)
            if not own & self.tensors.keys() and any(id(named[name]) in added for name in own)
        )

    @property
    def swapped(self) -> list[bool]:
        """Of each pair, whether the factor that takes features in has full rank, and the floor goes on the other."""
        self._swapped += [self._is_swapped(pair) for pair in self.pairs[len(self._swapped) :]]
        return self._swapped

    @swapped.setter
    def swapped(self, saved: Sequence[bool]) -> None:
        self._swapped = [bool(each) for each in saved]

    @property
    def decided(self) -> tuple[bool, ...]:
        """As `swapped`, of the pairs for which it has been decided yet."""
        return tuple(self._swapped)

    def rows(self, pair: FactorPair, side: FactorSide) -> int:
        """How many rows the matrix of one side has."""
        return sum(
            self.tensors[leg.name].numel() // self.tensors[leg.name].shape[leg.axis] * leg.places.shape[0]
            for leg in pair.legs(side)
        )

    def joined(self, name: str, gauged: Tensor, plain: Tensor) -> Tensor:
        """A step in a gauge where pairs move a tensor, and the plain one in its other entries; a task in front."""
        step = plain
        for pair in self.pairs:
            for leg in (*pair.outgoing, *pair.incoming):
                if leg.name == name:
                    places = leg.flat.to(step.device)
                    step = step.index_copy(leg.axis + 1, places, gauged.index_select(leg.axis + 1, places))
        return step

    def _is_swapped(self, pair: FactorPair) -> bool:
        out, into = (rows_of(pair, side, self._raised(pair, side)) for side in SIDES)
        assert out is not None
        assert into is not None
        if not bool(out.any()) or not bool(into.any()):
            return bool(into.any())
        return out.shape[1] < pair.size <= into.shape[1]

    def _raised(self, pair: FactorPair, side: FactorSide) -> Tensors:
        return {name: self.tensors[name].detach().unsqueeze(0) for name in pair.names(side)}

    def _covered(self) -> dict[str, bool]:
        """Of each tensor of pairs, whether they move all of its entries."""
        moved: dict[str, set[int]] = {}
        sizes: dict[str, int] = {}
        for pair in self.pairs:
            for leg in (*pair.outgoing, *pair.incoming):
                moved.setdefault(leg.name, set()).update(leg.places.flatten().tolist())
                sizes[leg.name] = self.tensors[leg.name].shape[leg.axis]
        return {name: len(places) == sizes[name] for name, places in moved.items()}


def known_factors(model: nn.Module, symmetries: Sequence[Symmetry] | None, example_input: Any) -> Factors:
    """The factors of the symmetries that were given or are found; a warning where there are none and none were given.

    Args:
        model: without wrappers.
        symmetries: of the model, or None.
        example_input: of the model, or None: finds the symmetries of any model.

    Raises:
        ValueError: if a symmetry names what the model does not have.
    """
    factors = Factors(model, factor_pairs(_symmetries(model, symmetries, example_input)))
    if not factors.pairs and symmetries is None:
        told = next((kind for mark, kind in _NOT_SERVED.items() if mark in _parts(model)), None)
        cure = (
            "give example_input=, a batch that the model takes, or name them, as "
            "symmetries=[metateleport.symmetries.LoRAPair.of(model, 'a', 'b')]"
            if told is None
            else f"adapters of {told} have something of their own between their factors, which no gauge goes through"
        )
        warnings.warn(
            "GaugedOptimizer knows no factors of a product in this model and steps as without gauges: "
            f"{cure}; symmetries=[] says that there are none",
            stacklevel=3,
        )
    return factors


def _parts(model: nn.Module) -> set[str]:
    """All parts of the parameters' names."""
    return {part for name, _ in model.named_parameters() for part in name.split(".")}


def _symmetries(model: nn.Module, given: Sequence[Symmetry] | None, example_input: Any) -> Sequence[Symmetry]:
    if given is None and example_input is None:
        return told_symmetries(model, frozen=True)
    if given is None:
        adapters = adapter_pairs(model, frozen=True)
        try:
            return (*adapters, *exact_symmetries(model, example_input, buffers=False))
        except Unsuitable:
            return adapters
    if not isinstance(given, Iterable) or any(not isinstance(each, Symmetry) for each in given):
        raise ValueError(
            "symmetries is a list of symmetries, as [metateleport.symmetries.LoRAPair.of(model, 'a', 'b')]; not "
            f"{given!r}"
        )
    named: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for symmetry in given:
        unknown = [name for name in symmetry.parameters if name not in named]
        if unknown:
            raise ValueError(f"{symmetry!r} names {unknown[0]!r}, which the model does not have")
    return given
