"""Splits the classes of variables that may move into matrix groups and diagonal groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from metateleport.detection.ledger import Classes, Ledger, Slot

__all__ = ["Parts"]


class Parts:
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
        self._by_label: dict[int, dict[int, list[int]]] = {}
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

    def labelled(self, labels: Mapping[str, torch.Tensor], roots: np.ndarray) -> list[str]:
        """The names of those labels in which some of the classes stand, in the labels' order."""
        if id(labels) not in self._by_label:
            index: dict[int, list[int]] = {}
            for number, label in enumerate(labels.values()):
                for root in self._roots(label.numpy().reshape(-1)):
                    index.setdefault(root, []).append(number)
            self._by_label[id(labels)] = index
        known, names = self._by_label[id(labels)], list(labels)
        numbers = {number for root in roots.tolist() for number in known.get(root, ())}
        return [names[number] for number in sorted(numbers)]

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
