"""The base of few-shot families: the learner's network, its symmetries, and the task of an episode."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import nn

from metateleport.families import FamilyError, Task, TaskFamily
from metateleport.families.classification import accuracy, linear
from metateleport.fewshot.episodes import Episode
from metateleport.symmetries import LinearPair, Rescaling, Symmetry

__all__ = ["FewShotFamily"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotFamily(TaskFamily):
    """Few-shot classification with a small perceptron: the support is a task's training data, the query its held-out.

    A family draws an `Episode` in its `sample` and hands it to `task_of`.

    Settings:
        ways: number of classes of a task.
        shots: support images per class.
        queries: query images per class.
        hidden: units of the hidden layer.
        bottleneck: width of a linear layer between the hidden layer and the outputs, or `none`: with it, GL is an
            exact symmetry beside rescaling.
        slope: of LeakyReLU below zero.

    Example:
        >>> from typing import ClassVar
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Own(FewShotFamily):
        ...     '''Noise, sorted by chance.'''
        ...     name: ClassVar[str] = "own"
        ...     def sample(self, seed):
        ...         images, targets = torch.rand(self.ways, 9), torch.arange(self.ways)
        ...         return self.task_of(Episode((images, targets), (images, targets)), seed)
        >>> [each.dimension for each in Own().task(0).symmetries]
        [32, 64]
    """

    ways: int = 4
    shots: int = 5
    queries: int = 15
    hidden: int = 32
    bottleneck: int | None = 8
    slope: float = 0.1

    def task_of(self, episode: Episode, seed: int) -> Task:
        """The task of an episode, its network drawn from `seed`; images in torch's default dtype."""
        (support, labels), (query, query_labels) = episode
        model = self._network(support.shape[1], torch.Generator().manual_seed(seed))
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(support.to(torch.get_default_dtype()),),
            targets=(labels,),
            symmetries=self._symmetries(model),
            seed=seed,
            held_out=((query.to(torch.get_default_dtype()),), (query_labels,)),
            score=accuracy,
        )

    def _check_network(self) -> None:
        """Raises FamilyError if the network's settings cannot work."""
        if self.hidden < 1 or (self.bottleneck is not None and self.bottleneck < 1):
            raise FamilyError(
                f"{self.name}: hidden and bottleneck are widths of at least 1; got hidden={self.hidden}, "
                f"bottleneck={self.bottleneck}"
            )
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"{self.name}: slope has to lie between 0 and 1, it is {self.slope}")

    def _network(self, pixels: int, source: torch.Generator) -> nn.Sequential:
        sizes = [pixels, self.hidden, *([] if self.bottleneck is None else [self.bottleneck]), self.ways]
        layers = [linear(incoming, outgoing, source) for incoming, outgoing in itertools.pairwise(sizes)]
        return nn.Sequential(layers[0], nn.LeakyReLU(self.slope), *layers[1:])

    def _symmetries(self, model: nn.Sequential) -> list[Symmetry]:
        rescaling = Rescaling(model, "0", "2")
        return [rescaling] if self.bottleneck is None else [rescaling, LinearPair(model, "2", "3")]
