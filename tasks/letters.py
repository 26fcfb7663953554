"""Real text, the docstrings of Python's standard library: which letter comes next, by embeddings and a perceptron."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Task, TaskFamily
from metateleport.families import FamilyError, Split, split_of
from metateleport.families.classification import accuracy, linear
from metateleport.families.labelled import read_once

LETTERS = " \nabcdefghijklmnopqrstuvwxyz.,()'\"-_:=`*0"
"""All other characters share the last index."""
MODULES: dict[Split, tuple[str, ...]] = {
    "train": (
        "argparse",
        "collections/__init__",
        "configparser",
        "datetime",
        "decimal",
        "difflib",
        "inspect",
        "random",
    ),
    "validation": ("logging/__init__", "statistics"),
    "held-out": ("asyncio/base_events", "functools", "subprocess"),
}
"""The modules whose docstrings the tasks of a split read. They are those of the Python that runs."""
HELD_OUT_SAMPLES = 400


@read_once
def text(split: Split) -> Tensor:
    """The docstrings of a split's modules as one sequence of indices of letters."""
    folder, found = Path(os.__file__).parent, []
    for name in MODULES[split]:
        path = folder / f"{name}.py"
        if not path.is_file():
            raise FamilyError(f"letters reads docstrings of the standard library, and {path} is not there")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    rest = len(LETTERS) - 1
    return torch.tensor([index if (index := LETTERS.find(each)) >= 0 else rest for each in " ".join(found).lower()])


class NextLetter(nn.Module):
    """The embeddings of the last letters, side by side, and one hidden layer."""

    def __init__(self, source: torch.Generator, *, context: int, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.table = nn.utils.skip_init(nn.Embedding, len(LETTERS), width)
        with torch.no_grad():
            self.table.weight.normal_(0.0, scale, generator=source)
        self.inner = linear(context * width, hidden, source, scale)
        self.head = linear(hidden, len(LETTERS), source, scale)

    def forward(self, letters: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(letters).flatten(-2))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters(TaskFamily):
    """Prediction of the letter that follows a few others, in docstrings of the standard library.

    Each task has a stretch of text of its own, its start and its order. Held-out tasks read other modules than training
    tasks, and the last part of a task's stretch is never trained on. The texts are those of the Python that runs, so
    equal figures need the same version.

    Settings:
        context: letters that are seen.
        width: numbers that a letter is embedded in.
        hidden: units of the hidden layer.
        samples: letters to predict, of one stretch of text.
        batch: samples a minibatch; `all` for the whole set.
        scale: factor on the initial weights.
    """

    name: ClassVar[str] = "letters"

    context: int = 4
    width: int = 8
    hidden: int = 32
    samples: int = 2000
    batch: int | None = 64
    scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.context, self.width, self.hidden, self.samples) < 1:
            raise FamilyError("letters: context, width, hidden and samples are at least 1")
        if self.samples > 8000:
            raise FamilyError(f"letters: samples={self.samples} is more than the texts of a split have, 8000 at most")
        if self.batch is not None and not 1 <= self.batch <= self.samples:
            raise FamilyError(f"letters: batch={self.batch} has to lie between 1 and samples={self.samples}")
        if not 0 < self.scale < float("inf"):
            raise FamilyError(f"letters: scale is a positive factor, not {self.scale}")

    def augmented(self, index: int, seed: int) -> Letters:
        """Widths and hidden layers from half to one and a half times the settings, batches from half to twice, and
        weights from a third to three times."""
        source = np.random.default_rng([seed, index])

        def around(setting: int) -> int:
            return max(int(source.integers(round(0.5 * setting), round(1.5 * setting) + 1)), 1)

        batch = self.batch and min(max(round(self.batch * 2 ** source.uniform(-1, 1)), 1), self.samples)
        return dataclasses.replace(
            self,
            width=around(self.width),
            hidden=around(self.hidden),
            batch=batch,
            scale=self.scale * float(3 ** source.uniform(-1, 1)),
        )

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        whole = text(split_of(seed))
        count = self.samples + HELD_OUT_SAMPLES
        first = int(torch.randint(len(whole) - count - self.context, (), generator=source))
        windows = whole[first : first + count + self.context].unfold(0, self.context + 1, 1)
        inputs, targets = windows[:, :-1], windows[:, -1]
        model = NextLetter(source, context=self.context, width=self.width, hidden=self.hidden, scale=self.scale)
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(inputs[: self.samples],),
            targets=(targets[: self.samples],),
            batch_size=self.batch,
            seed=seed,
            held_out=((inputs[self.samples :],), (targets[self.samples :],)),
            score=accuracy,
        )
