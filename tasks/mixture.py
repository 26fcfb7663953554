"""A mixture of families: every meta-batch has tasks of one of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from metateleport import Task, TaskFamily, load_family
from metateleport.families import FamilyError, Split, TaskStack, split_of

MEMBERS = "digits,mnist1d,residual_digits,recurrent_digits,autoencoder_digits,bottleneck_digits,letters,teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(TaskFamily):
    """Tasks of several families, for a meta-optimizer that is to serve any model.

    A meta-batch of training is of one member, drawn by its number, and varies that member's settings as the member
    does. Validation batches are of the members in turn, or of families that are left out of training. Without that
    variation, a task of the mixture is one of the first member: evaluate on the members by their own names.

    Settings:
        members: names of families in the gallery, with commas between them; one that is named twice is drawn twice as
            often.
        left_out: names of families that validation tasks are of in the place of the members, so that the networks are
            chosen by what they do where they have not been trained; none for the members themselves.
    """

    name: ClassVar[str] = "mixture"

    members: str = MEMBERS
    left_out: str | None = None

    def __post_init__(self) -> None:
        for setting, value in (("members", self.members), ("left_out", self.left_out)):
            if value is not None and not all(name.strip() for name in value.split(",")):
                raise FamilyError(f"mixture: {setting} are names of families with commas between them, not {value!r}")
        if self.name in (*_names(self.members), *_names(self.left_out)):
            raise FamilyError("mixture: a mixture cannot be a member of itself")
        both = [name for name in _names(self.left_out) if name in _names(self.members)]
        if both:
            raise FamilyError(f"mixture: {both[0]} is a member and cannot be left out: name it in one of the two")

    @functools.cached_property
    def families(self) -> tuple[TaskFamily, ...]:
        """The members, loaded."""
        return tuple(load_family(name) for name in _names(self.members))

    @functools.cached_property
    def validating(self) -> tuple[TaskFamily, ...]:
        """The families that validation tasks are of, loaded."""
        return tuple(load_family(name) for name in _names(self.left_out)) or self.families

    def augmented(self, index: int, seed: int) -> TaskFamily:
        """One of the members, with its own settings varied; all come once, in a new order, before one comes again.

        With `left_out` it is still the mixture: `of` has what was drawn for each split.
        """
        if self.left_out is None:
            return _in_turn(self.families, index, seed)
        made = copy.copy(self)
        drawn = {"validation": _in_turn(self.validating, index, seed)}
        drawn["train"] = drawn["held-out"] = _in_turn(self.families, index, seed)
        made.__dict__["_drawn"] = drawn
        return made

    def of(self, split: Split) -> TaskFamily:
        """The family that a stack of a split is of."""
        drawn: dict[str, TaskFamily] = self.__dict__.get("_drawn", {})
        return drawn.get(split, self.families[0])

    def sample(self, seed: int) -> Task:
        return self.of(split_of(seed)).sample(seed)

    def stack(
        self,
        indices: Sequence[int],
        split: Split = "train",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> TaskStack:
        return self.of(split).stack(indices, split, seed, dtype, device)


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]


def _in_turn(families: Sequence[TaskFamily], index: int, seed: int) -> TaskFamily:
    count = len(families)
    turn, place = divmod(index, count)
    chosen = np.random.default_rng([seed, turn]).permutation(count)[place]
    return families[int(chosen)].augmented(index, seed)
