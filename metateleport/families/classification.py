"""Task families that classify real data; each task has its own subset of classes, start and order."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.families.family import FamilyError, TaskFamily, load_family
from metateleport.families.labelled import LabelledData
from metateleport.families.task import Split, Task, split_of
from metateleport.symmetries import Rescaling, Symmetry

__all__ = ["ClassificationFamily", "PerceptronFamily", "accuracy", "data_of", "linear", "subsets"]

# Of every five subsets of the classes, shares of the splits; validation and held-out tasks need few.
SHARES: dict[Split, tuple[int, ...]] = {"train": (0, 1, 2), "validation": (3,), "held-out": (4,)}


@functools.cache
def subsets(labels: int, classes: int, split: Split) -> tuple[tuple[int, ...], ...]:
    """The sets of classes that tasks of a split classify; no set belongs to two splits.

    Args:
        labels: number of classes in the data.
        classes: number of classes in a task.
        split: the split.

    Example:
        >>> [len(subsets(10, 5, split)) for split in ("train", "validation", "held-out")]
        [152, 50, 50]
    """
    every = list(itertools.combinations(range(labels), classes))
    order = np.random.default_rng(classes).permutation(len(every))
    return tuple(every[number] for place, number in enumerate(order) if place % 5 in SHARES[split])


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the samples, the last dimension of `targets`, whose largest output is the right one."""
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(-1)


def linear(incoming: int, outgoing: int, source: torch.Generator, scale: float = 1.0, bias: bool = True) -> nn.Linear:
    """A linear layer with torch's usual start, drawn from `source` and scaled.

    Example:
        >>> linear(4, 3, torch.Generator().manual_seed(0)).weight.abs().max() <= 0.5
        tensor(True)
    """
    layer = nn.utils.skip_init(nn.Linear, incoming, outgoing, bias=bias)
    bound = scale * incoming**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=source)
        if bias:
            layer.bias.uniform_(-bound, bound, generator=source)
    return layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationFamily(TaskFamily):
    """Classification of a subset of a data set's classes, in minibatches.

    Held-out tasks have subsets of classes that no training task has. No task trains on the samples that accuracy is
    measured on. All tasks share the data; each knows its own rows.

    Args:
        classes: number of classes of a task.
        samples: training samples per task, drawn from its classes' samples except the held-out ones.
        batch: samples per minibatch; `all` for the whole set.
        scale: factor on the initial weights; 1 is torch's usual initialization.
        label_noise: share of the training labels that are replaced by random ones.

    Raises:
        FamilyError: if a setting cannot work.
    """

    labels: ClassVar[int] = 10
    """Number of classes in the data."""
    training_each: ClassVar[int]
    """Training samples of each class."""

    classes: int = 5
    samples: int = 640
    batch: int | None = 64
    scale: float = 1.0
    label_noise: float = 0.0

    @abc.abstractmethod
    def data(self) -> LabelledData:
        """The samples by class, scaled; slow reads are cached (`read_once`)."""

    @abc.abstractmethod
    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        """A model at its start, drawn from `source`, with its symmetries in the order of the data flow."""

    def __post_init__(self) -> None:
        if not 2 <= self.classes < self.labels:
            raise FamilyError(
                f"{self.name}: classes has to lie between 2 and {self.labels - 1}, it is {self.classes}: the splits "
                f"share out the subsets of the {self.labels} classes, and all of them make only one"
            )
        largest = self.classes * self.training_each
        if not self.classes <= self.samples <= largest:
            raise FamilyError(
                f"{self.name}: samples={self.samples} has to lie between {self.classes} and {largest}, the training "
                f"samples of {self.classes} classes"
            )
        if self.batch is not None and not 1 <= self.batch <= self.samples:
            raise FamilyError(f"{self.name}: batch={self.batch} has to lie between 1 and samples={self.samples}")
        if not 0 < self.scale < float("inf"):
            raise FamilyError(f"{self.name}: scale is a positive factor, not {self.scale}")
        if not 0 <= self.label_noise <= 1:
            raise FamilyError(f"{self.name}: label_noise has to lie between 0 and 1, it is {self.label_noise}")

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        possible = subsets(self.labels, self.classes, split_of(seed))
        chosen = torch.tensor(possible[int(torch.randint(len(possible), (), generator=source))])
        training, held_out = self.data().rows(torch.get_default_dtype())
        each = self.training_each
        drawn = torch.randperm(self.classes * each, generator=source)[: self.samples]
        model, symmetries = self.network(source)
        # Classes that are not the task's have no number; their samples are in none of its rows.
        numbers = torch.full((self.labels,), -1)
        numbers[chosen] = torch.arange(self.classes)
        targets = numbers.repeat_interleave(each)
        rows = chosen[drawn // each] * each + drawn % each
        if self.label_noise:
            wrong = torch.rand(self.samples, generator=source) < self.label_noise
            anew = torch.randint(self.classes, (self.samples,), generator=source)
            targets[rows] = torch.where(wrong, anew, targets[rows])
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(training,),
            targets=(targets,),
            symmetries=symmetries,
            batch_size=self.batch,
            seed=seed,
            held_out=(
                (held_out[chosen].flatten(0, 1),),
                (torch.arange(self.classes).repeat_interleave(held_out.shape[1]),),
            ),
            score=accuracy,
            rows=rows,
        )

    def _varied(self, source: np.random.Generator) -> dict[str, Any]:
        """Data settings for one meta-batch; half of the meta-batches have no label noise."""
        samples = max(round(self.samples * 2 ** source.uniform(-1, 0)), self.classes)
        batch = self.batch and min(max(round(self.batch * 2 ** source.uniform(-1, 1)), 1), samples)
        noise = min(self.label_noise + max(source.uniform(-0.2, 0.2), 0.0), 1.0)
        return {
            "samples": samples,
            "batch": batch,
            "scale": self.scale * float(3 ** source.uniform(-1, 1)),
            "label_noise": float(noise),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptronFamily(ClassificationFamily):
    """Classification by a LeakyReLU perceptron, whose rescalings are exact on every batch.

    Args:
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        slope: of LeakyReLU below zero.

    Raises:
        FamilyError: if a setting cannot work.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Own(PerceptronFamily):
        ...     name: ClassVar[str] = "own"
        ...     training_each: ClassVar[int] = 200
        ...     def data(self):
        ...         return LabelledData(torch.zeros(10, 200, 7), torch.zeros(10, 50, 7))
        >>> Own(batch=16).task(0).batch(0)[0][0].shape
        torch.Size([16, 7])
    """

    hidden: int = 32
    depth: int = 2
    slope: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.depth < 2:
            raise FamilyError(
                f"{self.name} needs at least 1 hidden unit and a depth of at least 2; got hidden={self.hidden}, "
                f"depth={self.depth}"
            )
        super().__post_init__()
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"{self.name}: slope has to lie between 0 and 1, it is {self.slope}")

    def augmented(self, index: int, seed: int) -> PerceptronFamily:
        """Hidden widths from half to one and a half times the setting, up to two layers more, ReLU or LeakyReLU of half
        to twice the slope; samples from half, batches from half to twice, weights from a third to three times, and up
        to a fifth of the labels drawn anew in half of the batches."""
        source = np.random.default_rng([seed, index])
        hidden = int(source.integers(round(0.5 * self.hidden), round(1.5 * self.hidden) + 1))
        slope = 0.0 if source.uniform() < 1 / 3 else min(self.slope * 2 ** source.uniform(-1, 1), 1.0)
        return dataclasses.replace(
            self,
            hidden=max(hidden, 1),
            depth=self.depth + int(source.integers(3)),
            slope=float(slope),
            **self._varied(source),
        )

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        features = self.data().training.shape[-1]
        sizes = [features, *[self.hidden] * (self.depth - 1), self.classes]
        layers: list[nn.Module] = []
        for incoming, outgoing in itertools.pairwise(sizes):
            layers += [linear(incoming, outgoing, source, self.scale), nn.LeakyReLU(self.slope)]
        model = nn.Sequential(*layers[:-1])
        places = range(0, 2 * self.depth, 2)
        return model, [Rescaling(model, str(first), str(second)) for first, second in itertools.pairwise(places)]


@functools.cache
def data_of(name: str) -> LabelledData:
    """The data of a family of the gallery, for another one that classifies the same samples with another model.

    Args:
        name: of a classification family in the gallery.

    Raises:
        FamilyError: if there is no such family, it does not classify, or its data are not there.
    """
    family = load_family(name)
    if not isinstance(family, ClassificationFamily):
        raise FamilyError(f"{name} does not classify labelled data: {type(family).__name__} has none to share")
    return family.data()
