"""Real text, docstrings of Python's standard library: which module a few words are of, by the mean of embeddings."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Symmetry
from metateleport.families import FamilyError
from metateleport.families.classification import ClassificationFamily, linear
from metateleport.families.labelled import LabelledData, read_once, share_out

MODULES = (
    "_pyio",
    "difflib",
    "doctest",
    "inspect",
    "ipaddress",
    "logging/__init__",
    "smtplib",
    "statistics",
    "threading",
    "typing",
)
"""The classes. Their docstrings are those of the Python that runs."""
WORDS, KNOWN = 16, 400
"""Words of a sample, and how many different ones have an index of their own; all others share the index 0."""
TRAINING_EACH, HELD_OUT_EACH = 80, 20


@read_once
def text() -> LabelledData:
    """Windows of words by module, as indices: `(10, 80, 16)` to train on and `(10, 20, 16)` held out."""
    folder, found = Path(os.__file__).parent, []
    for name in MODULES:
        path = folder / f"{name}.py"
        if not path.is_file():
            raise FamilyError(f"bags reads docstrings of the standard library, and {path} is not there")
        said = [
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        found.append(re.findall(r"[a-z]+", " ".join(said).lower()))
    counts = Counter(word for words in found for word in words)
    # Of words that are as frequent as each other the first in the alphabet.
    known = sorted(counts, key=lambda word: (-counts[word], word))[: KNOWN - 1]
    numbers = {word: number for number, word in enumerate(known, start=1)}
    windows, labels = [], []
    for label, words in enumerate(found):
        for start in range(0, len(words) - WORDS + 1, WORDS):
            windows.append([numbers.get(word, 0) for word in words[start : start + WORDS]])
            labels.append(label)
    # Numbers, as the data of all classification families are; they are exact.
    return share_out(np.array(windows, dtype=float), np.array(labels), TRAINING_EACH, HELD_OUT_EACH)


class Bag(nn.Module):
    """The mean of the words' embeddings, hidden layers, and a head."""

    def __init__(
        self, source: torch.Generator, *, width: int, hidden: int, depth: int, classes: int, scale: float
    ) -> None:
        super().__init__()
        self.table = nn.utils.skip_init(nn.Embedding, KNOWN, width)
        with torch.no_grad():
            self.table.weight.normal_(0.0, scale, generator=source)
        sizes = [width, *[hidden] * depth]
        self.inner = nn.ModuleList(linear(before, after, source, scale) for before, after in itertools.pairwise(sizes))
        self.head = linear(sizes[-1], classes, source, scale)

    def forward(self, words: Tensor) -> Tensor:
        state = self.table(words.long()).mean(-2)
        for layer in self.inner:
            state = torch.tanh(layer(state))
        return self.head(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bags(ClassificationFamily):
    """Classification of windows of words by the module of the standard library that they are of.

    Held-out tasks have sets of modules that no training task has, and no task trains on the windows that accuracy is
    measured on. The texts are those of the Python that runs, so equal figures need the same version.

    Settings:
        width: numbers that a word is embedded in.
        hidden: units of each hidden layer.
        depth: number of hidden layers; zero for a head on the mean itself.
        classes: modules that a task has to tell apart.
        samples: training windows a task.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "bags"
    training_each: ClassVar[int] = TRAINING_EACH

    samples: int = 320
    batch: int | None = 32
    width: int = 16
    hidden: int = 32
    depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.hidden) < 1 or self.depth < 0:
            raise FamilyError(
                f"bags: width and hidden are at least 1 and depth at least 0; got width={self.width}, "
                f"hidden={self.hidden}, depth={self.depth}"
            )

    def augmented(self, index: int, seed: int) -> Bags:
        """Widths and hidden layers from half to one and a half times the settings, up to one layer more or less, and
        samples, batches, weights and labels as in `digits`."""
        source = np.random.default_rng([seed, index])

        def around(setting: int) -> int:
            return max(int(source.integers(round(0.5 * setting), round(1.5 * setting) + 1)), 1)

        return dataclasses.replace(
            self,
            width=around(self.width),
            hidden=around(self.hidden),
            depth=max(self.depth + int(source.integers(-1, 2)), 0),
            **self._varied(source),
        )

    def data(self) -> LabelledData:
        return text()

    def network(self, source: torch.Generator) -> tuple[nn.Module, Sequence[Symmetry]]:
        model = Bag(
            source, width=self.width, hidden=self.hidden, depth=self.depth, classes=self.classes, scale=self.scale
        )
        return model, []
