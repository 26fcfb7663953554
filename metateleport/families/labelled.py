"""Labelled data by class, divided into training and held-out samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["LabelledData", "read_once", "share_out", "standardised"]


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledData:
    """Samples by class: training samples, and held-out samples that no task trains on.

    Args:
        training: `(classes, samples, features)`.
        held_out: `(classes, samples, features)`.

    Example:
        >>> LabelledData(torch.zeros(10, 140, 64), torch.zeros(10, 34, 64)).rows(torch.float32)[0].shape
        torch.Size([1400, 64])
    """

    training: Tensor
    held_out: Tensor

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All training samples in rows, class after class, and the held-out ones by class: one copy for all tasks."""
        return self.training.to(dtype).flatten(0, 1), self.held_out.to(dtype)


def share_out(samples: np.ndarray, labels: np.ndarray, training: int, held_out: int) -> LabelledData:
    """Shuffles samples, the same way each time, and divides each class into training and held-out samples.

    Args:
        samples: `(samples, features)`.
        labels: the class of each, `(samples,)`, from 0.
        training: samples a class to train on.
        held_out: samples a class that no task trains on; further ones are left out.

    Raises:
        ValueError: if a class has too few samples.

    Example:
        >>> data = share_out(np.arange(12.0).reshape(6, 2), np.array([0, 1, 0, 1, 0, 1]), training=2, held_out=1)
        >>> data.training.shape, data.held_out.shape
        (torch.Size([2, 2, 2]), torch.Size([2, 1, 2]))
    """
    count = training + held_out
    counts = np.bincount(labels)
    if counts.min() < count:
        raise ValueError(f"{count} samples of every class are asked for; class {counts.argmin()} has {counts.min()}")
    order = np.random.default_rng(0).permutation(len(labels))
    samples, labels = samples[order], labels[order]
    by_class = torch.from_numpy(np.stack([samples[labels == label][:count] for label in range(len(counts))]))
    return LabelledData(by_class[:, :training], by_class[:, training:])


def standardised(data: LabelledData) -> LabelledData:
    """Scales by the mean and deviation of all training entries together, as some pixels have no deviation.

    Example:
        >>> data = standardised(LabelledData(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0]]])))
        >>> data.held_out
        tensor([[[0.]]])
    """
    mean, deviation = data.training.mean(), data.training.std()
    return LabelledData((data.training - mean) / deviation, (data.held_out - mean) / deviation)


_READ: dict[tuple[Any, ...], Any] = {}
_Value = TypeVar("_Value")


def read_once(function: Callable[..., _Value]) -> Callable[..., _Value]:
    """Caches a function of a family's file by its arguments, for the whole process.

    `functools.cache` does not serve: a family's file is run at every load, and its cache would start empty.

    Args:
        function: reads data; its arguments are hashable.

    Example:
        >>> @read_once
        ... def squares(count):
        ...     print("read")
        ...     return [number**2 for number in range(count)]
        >>> squares(3), squares(3)
        read
        ([0, 1, 4], [0, 1, 4])
    """

    @functools.wraps(function)
    def kept(*arguments: Any) -> _Value:
        key = (function.__code__.co_filename, function.__code__, *arguments)
        if key not in _READ:
            _READ[key] = function(*arguments)
        return _READ[key]

    return kept
