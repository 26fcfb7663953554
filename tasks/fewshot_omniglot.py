"""Few-shot classification of Omniglot's 1623 handwritten characters in four turns, through learn2learn's loader."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metateleport import Task
from metateleport.families import SPLITS, FamilyError, Split, split_of
from metateleport.fewshot import Episodes, FewShotFamily, MissingLearn2Learn, omniglot

TURNS = 4
IMAGES = 20
"""Of every character, each by another hand."""
SHARES: dict[Split, float] = {"train": 1100 / 1623, "validation": 100 / 1623, "held-out": 423 / 1623}
"""Of the characters, as in learn2learn's own benchmark."""


class Characters:
    """Images in four turns, read when they are asked for.

    Args:
        data: a `learn2learn.vision.datasets.FullOmniglot` and the character of each of its images.
        size: pixels a side.
    """

    def __init__(self, data: tuple[Any, Sequence[int]], size: int) -> None:
        self.images, self.characters = data
        self.size = size
        self._read = functools.lru_cache(maxsize=40_000)(self._image)

    def labels(self) -> list[int]:
        """The class of every image in every turn."""
        return [character * TURNS + turn for character in self.characters for turn in range(TURNS)]

    def __call__(self, indices: Tensor) -> Tensor:
        """Images by their number, `(n, size * size)` in float32, ink at one."""
        return torch.stack([self._turned(int(index)) for index in indices])

    def _turned(self, index: int) -> Tensor:
        return torch.rot90(self._read(index // TURNS), index % TURNS).flatten()

    def _image(self, index: int) -> Tensor:
        drawing = self.images[index][0].resize((self.size, self.size))
        return 1 - torch.from_numpy(np.asarray(drawing, dtype=np.float32)) / 255


@functools.cache
def drawn(root: Path, download: bool, size: int) -> tuple[Episodes, dict[Split, tuple[int, ...]]]:
    """Where tasks are drawn from, and the classes of each split.

    The characters are shared out in an order drawn once; all turns of one are in the same split.

    Raises:
        FamilyError: if learn2learn or the data are not there.
    """
    try:
        characters = Characters(omniglot(root, download), size)
        episodes = Episodes(characters.labels(), characters)
    except MissingLearn2Learn as error:
        raise FamilyError(f"few-shot tasks are made by learn2learn: {error}") from error
    except FileNotFoundError as error:
        raise FamilyError(f"fewshot_omniglot: {error}") from error
    count = len(set(characters.characters))
    order = np.random.default_rng(0).permutation(count)
    ends = np.rint(np.cumsum([SHARES[split] for split in SPLITS]) * count).astype(int)
    shares = np.split(order, ends[:-1])
    classes = {
        split: tuple(int(character) * TURNS + turn for character in sorted(share) for turn in range(TURNS))
        for split, share in zip(SPLITS, shares, strict=True)
    }
    return episodes, classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotOmniglot(FewShotFamily):
    """Few-shot classification of Omniglot's characters: other classes, images and initialisation a task.

    A class is a character in one of four turns. The splits share out the characters, so that a held-out task is
    about classes and images that no training task has met. The images to adapt to are the training data of a task,
    further images of the same classes are its held-out data.

    Settings:
        root: the folder that holds Omniglot, or that it is to be fetched into.
        download: fetch it there, 15 MB, where it is not.
        size: pixels a side that images are scaled to.
        ways: classes that a task has to tell apart.
        shots: images a class to adapt to.
        queries: held-out images a class.
        hidden: units of the hidden layer.
        bottleneck: width of a linear layer between the hidden layer and the outputs, or `none`: with it, GL is an
            exact symmetry beside rescaling.
        slope: of LeakyReLU below zero.
    """

    name: ClassVar[str] = "fewshot_omniglot"

    root: str = "data"
    download: bool = False
    size: int = 28
    ways: int = 5
    shots: int = 1
    queries: int = 10
    hidden: int = 64
    bottleneck: int | None = 16

    def __post_init__(self) -> None:
        if self.ways < 2 or min(self.shots, self.queries) < 1 or self.shots + self.queries > IMAGES:
            raise FamilyError(
                f"fewshot_omniglot needs at least 2 ways, and at least 1 shot and 1 query of the {IMAGES} images of a "
                f"character; got ways={self.ways}, shots={self.shots}, queries={self.queries}"
            )
        if self.size < 1:
            raise FamilyError(f"fewshot_omniglot: size is at least 1; got size={self.size}")
        self._check_network()

    def sample(self, seed: int) -> Task:
        episodes, by_split = drawn(Path(self.root).expanduser().resolve(), self.download, self.size)
        classes = by_split[split_of(seed)]
        if len(classes) < self.ways:
            raise FamilyError(
                f"fewshot_omniglot: ways={self.ways}, and the {split_of(seed)} split of {self.root} has {len(classes)} "
                "classes"
            )
        return self.task_of(episodes.sample(classes, self.ways, self.shots, self.queries, seed), seed)
