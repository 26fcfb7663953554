"""A mixture of families: every meta-batch has tasks of one of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from metateleport import Task, TaskFamily, load_family
from metateleport.families import FamilyError, Split, TaskStack

MEMBERS = "digits,mnist1d,residual_digits,recurrent_digits,autoencoder_digits,bottleneck_digits,letters,teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(TaskFamily):
    """Tasks of several families, for a meta-optimizer that is to serve any model.

    A meta-batch of training is of one member, drawn by its number, and varies that member's settings as the member
    does. Validation batches are of the members in turn. Without that variation, a task of the mixture is one of the
    first member: evaluate on the members by their own names.

    Settings:
        members: names of families in the gallery, with commas between them; one that is named twice is drawn twice as
            often.
    """

    name: ClassVar[str] = "mixture"

    members: str = MEMBERS

    def __post_init__(self) -> None:
        if not all(name.strip() for name in self.members.split(",")):
            raise FamilyError(f"mixture: members are names of families with commas between them, not {self.members!r}")
        if self.name in self._names:
            raise FamilyError("mixture: a mixture cannot be a member of itself")

    @property
    def _names(self) -> list[str]:
        return [name.strip() for name in self.members.split(",")]

    @functools.cached_property
    def families(self) -> tuple[TaskFamily, ...]:
        """The members, loaded."""
        return tuple(load_family(name) for name in self._names)

    def augmented(self, index: int, seed: int) -> TaskFamily:
        """One of the members, with its own settings varied; all come once, in a new order, before one comes again."""
        count = len(self.families)
        turn, place = divmod(index, count)
        chosen = np.random.default_rng([seed, turn]).permutation(count)[place]
        return self.families[int(chosen)].augmented(index, seed)

    def sample(self, seed: int) -> Task:
        return self.families[0].sample(seed)

    def stack(
        self,
        indices: Sequence[int],
        split: Split = "train",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> TaskStack:
        return self.families[0].stack(indices, split, seed, dtype, device)
