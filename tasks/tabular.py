"""Real tables that come with scikit-learn: tumours and wines to tell apart, and the course of diabetes to predict."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Rescaling, Task, TaskFamily
from metateleport.families import FamilyError
from metateleport.families.classification import accuracy, linear
from metateleport.families.labelled import read_once

Table = Literal["breast_cancer", "wine", "diabetes"]
TABLES: tuple[Table, ...] = ("breast_cancer", "wine", "diabetes")
HELD_OUT = 4
"""One row of so many is held out."""


@read_once
def rows_of(load: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and targets, and held-out ones; columns, and targets that are numbers, have mean zero and
    deviation one over the training rows."""
    inputs, targets = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))
    unseen, seen = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    inputs = (inputs - inputs[seen].mean(0)) / inputs[seen].std(0)
    if targets.dtype.kind == "f":
        targets = ((targets - targets[seen].mean()) / targets[seen].std())[:, None]
    own, wanted = torch.from_numpy(inputs), torch.from_numpy(targets)
    return own[seen], wanted[seen], own[unseen], wanted[unseen]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(TaskFamily):
    """Classification or regression of a small table by a LeakyReLU perceptron, whose rescalings are exact.

    Each task has its own rows out of the training rows, start and order. A quarter of a table's rows is held out of all
    tasks; tasks of all splits are of the same tables.

    Settings:
        table: `breast_cancer` (two classes), `wine` (three classes) or `diabetes` (a number to predict).
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        share: of the training rows that a task has.
        batch: samples a minibatch; `all` for the whole set.
        slope: of LeakyReLU below zero.
        scale: factor on the initial weights.
    """

    name: ClassVar[str] = "tabular"

    table: Table = "breast_cancer"
    hidden: int = 32
    depth: int = 2
    share: float = 0.8
    batch: int | None = 32
    slope: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise FamilyError(f"tabular: table is one of {', '.join(TABLES)}, not {self.table!r}")
        if self.hidden < 1 or self.depth < 2:
            raise FamilyError(
                f"tabular needs at least 1 hidden unit and a depth of at least 2; got hidden={self.hidden}, "
                f"depth={self.depth}"
            )
        if not 0 < self.share <= 1:
            raise FamilyError(f"tabular: share has to lie above 0 and at most at 1, it is {self.share}")
        if self.batch is not None and self.batch < 1:
            raise FamilyError(f"tabular: batch={self.batch} has to be at least 1")
        if not 0 <= self.slope <= 1:
            raise FamilyError(f"tabular: slope has to lie between 0 and 1, it is {self.slope}")
        if not 0 < self.scale < float("inf"):
            raise FamilyError(f"tabular: scale is a positive factor, not {self.scale}")

    def augmented(self, index: int, seed: int) -> Tabular:
        """Any of the tables, hidden widths from half to one and a half times the setting, up to two layers more, ReLU
        or LeakyReLU of half to twice the slope, batches from half to twice, and weights from a third to three times."""
        source = np.random.default_rng([seed, index])
        slope = 0.0 if source.uniform() < 1 / 3 else min(self.slope * 2 ** source.uniform(-1, 1), 1.0)
        return dataclasses.replace(
            self,
            table=TABLES[int(source.integers(len(TABLES)))],
            hidden=max(int(source.integers(round(0.5 * self.hidden), round(1.5 * self.hidden) + 1)), 1),
            depth=self.depth + int(source.integers(3)),
            slope=float(slope),
            batch=self.batch and max(round(self.batch * 2 ** source.uniform(-1, 1)), 1),
            scale=self.scale * float(3 ** source.uniform(-1, 1)),
        )

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        inputs, targets, unseen, wanted = (_in_default(each) for each in rows_of(self._load()))
        regression = targets.ndim > 1
        count = max(round(self.share * len(inputs)), 1)
        outputs = 1 if regression else int(targets.max()) + 1
        sizes = [inputs.shape[1], *[self.hidden] * (self.depth - 1), outputs]
        layers: list[nn.Module] = []
        for incoming, outgoing in itertools.pairwise(sizes):
            layers += [linear(incoming, outgoing, source, self.scale), nn.LeakyReLU(self.slope)]
        model = nn.Sequential(*layers[:-1])
        places = range(0, 2 * self.depth, 2)
        return Task(
            model=model,
            loss=nn.functional.mse_loss if regression else nn.functional.cross_entropy,
            inputs=(inputs,),
            targets=(targets,),
            symmetries=[Rescaling(model, str(first), str(second)) for first, second in itertools.pairwise(places)],
            batch_size=None if self.batch is None else min(self.batch, count),
            seed=seed,
            held_out=((unseen,), (wanted,)),
            score=None if regression else accuracy,
            rows=torch.randperm(len(inputs), generator=source)[:count],
        )

    def _load(self) -> Callable[..., Any]:
        try:
            from sklearn import datasets
        except ImportError as error:
            raise FamilyError(
                "the tables come with scikit-learn, which is not installed: pip install 'metateleport[tasks]'"
            ) from error
        loads: dict[Table, Callable[..., Any]] = {
            "breast_cancer": datasets.load_breast_cancer,
            "wine": datasets.load_wine,
            "diabetes": datasets.load_diabetes,
        }
        return loads[self.table]


@read_once
def _converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One copy for all tasks, so that a stack does not hold one for each."""
    return values.to(dtype) if values.is_floating_point() else values


def _in_default(values: Tensor) -> Tensor:
    return _converted(values, torch.get_default_dtype())
