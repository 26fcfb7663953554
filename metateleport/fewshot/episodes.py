"""Few-shot tasks from labelled images, made with learn2learn's task transforms."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metateleport.fewshot.learn2learn import learn2learn

__all__ = ["Episode", "Episodes"]


class Episode(NamedTuple):
    """One few-shot task: support data to adapt to, and held-out query data. Targets run from 0 to `ways - 1`.

    Args:
        support: images `(ways * shots, ...)` and their targets.
        query: images `(ways * queries, ...)` and their targets.
    """

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


class Episodes:
    """Draws N-way K-shot tasks: learn2learn chooses the classes, their images and which class gets which target.

    Args:
        labels: the class of every image.
        images: maps indices of images, `(n,)` in int64, to the images, `(n, ...)`.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.

    Example:
        >>> episodes = Episodes([0, 0, 0, 1, 1, 1, 2, 2, 2], lambda indices: indices.unsqueeze(1).float())
        >>> episode = episodes.sample(classes=(0, 2), ways=2, shots=1, queries=2, seed=0)
        >>> episode.support[0].shape, episode.query[1]
        (torch.Size([2, 1]), tensor([0, 0, 1, 1]))

    Source: Finn, Abbeel and Levine, ICML 2017 (arXiv 1703.03400), section 5.2, for how tasks are drawn.
    """

    def __init__(self, labels: Sequence[int], images: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.counts: dict[int, int] = {}
        by_class: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            by_class.setdefault(int(label), []).append(index)
        self.counts = {label: len(indices) for label, indices in by_class.items()}
        # Given both, learn2learn neither opens every image nor reads a pickle that lies beside them.
        self._dataset = learn2learn().data.MetaDataset(
            _Indices(labels), labels_to_indices=by_class, indices_to_labels=dict(enumerate(map(int, labels)))
        )
        self._tasksets: dict[tuple[tuple[int, ...], int, int], Any] = {}

    def sample(self, classes: Sequence[int], ways: int, shots: int, queries: int, seed: int) -> Episode:
        """The task of one seed; Python's global random numbers, which learn2learn draws from, stay as they are.

        Args:
            classes: those that the task may draw from.
            ways: number of classes of the task.
            shots: support images per class.
            queries: query images per class.
            seed: equal ones give equal tasks.

        Raises:
            ValueError: if there are too few classes, or too few images of one.
        """
        each = shots + queries
        if min(ways, shots, queries) < 1 or len(set(classes)) < ways:
            raise ValueError(
                f"a task needs at least one way, shot and query, and no more ways than classes; got ways={ways}, "
                f"shots={shots}, queries={queries} and {len(set(classes))} classes"
            )
        few = [label for label in classes if self.counts.get(label, 0) < each]
        if few:
            raise ValueError(
                f"class {few[0]} has {self.counts.get(few[0], 0)} images, and shots={shots} with queries={queries} "
                f"need {each}"
            )
        with _seeded(seed):
            indices, targets = self._taskset(tuple(classes), ways, each).sample()
        by_target = indices[torch.argsort(targets, stable=True)].reshape(ways, each)
        support, query = by_target[:, :shots].reshape(-1), by_target[:, shots:].reshape(-1)
        kinds = torch.arange(ways)
        return Episode(
            (self.images(support), kinds.repeat_interleave(shots)),
            (self.images(query), kinds.repeat_interleave(queries)),
        )

    def _taskset(self, classes: tuple[int, ...], ways: int, each: int) -> Any:
        key = (classes, ways, each)
        if key not in self._tasksets:
            data = learn2learn().data
            transforms = [
                data.transforms.FusedNWaysKShots(self._dataset, n=ways, k=each, filter_labels=list(classes)),
                data.transforms.LoadData(self._dataset),
                data.transforms.RemapLabels(self._dataset),
                data.transforms.ConsecutiveLabels(self._dataset),
            ]
            self._tasksets[key] = data.Taskset(self._dataset, task_transforms=transforms, num_tasks=-1)
        return self._tasksets[key]


class _Indices(torch.utils.data.Dataset[tuple[int, int]]):
    """A data set whose images are their indices, so that the images of a task can be fetched at once."""

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(self.labels[index])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
