"""The learned optimizers with their default settings, compared with AdamW on real data.

Every shipped checkpoint that has a learned step trains models of many kinds, with minibatches of 32 in a plain loop of
`loss.backward(); optimizer.step(); optimizer.zero_grad()`. The final loss is the mean over the whole training set in
evaluation mode, and the median over seeds; AdamW has the best of three learning rates. A cell, which is one checkpoint
on one model, holds if the loss ends at most 10 % (perceptrons) or 30 % (other models) above AdamW's, or if the
optimizer warned when it was made that the checkpoint is not for that model. It does not hold if a NaN occurs or the
loss ends above its start.

Example:
    python -m benchmarks.in_use --json in_use.json
    python -m benchmarks.in_use --checkpoints digits --models mlp lstm --seeds 1
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from benchmarks._in_use_models import MODELS, InUse
from benchmarks._timing import conditions
from metateleport.checkpoint import shipped_checkpoints
from metateleport.files import write_json

__all__ = ["Cell", "main"]

SCHEMA = 1
BATCH, RATES = 32, (1e-4, 1e-3, 1e-2)
WITHIN_PERCEPTRON, WITHIN = 1.1, 1.3


@dataclasses.dataclass(frozen=True)
class Cell:
    """The result of one checkpoint on one model.

    Args:
        model: the model's name.
        checkpoint: the checkpoint's name.
        start: the loss before the first step.
        adamw: AdamW's final loss at its best rate.
        rate: that best learning rate.
        final: the final loss; None if the checkpoint refused the model or a step failed.
        nan: whether a loss or a weight was not finite in any seed.
        above: whether the loss ended above its start in any seed.
        refused: whether making the optimizer raised a `ValueError`.
        said: the error or the warnings when the optimizer was made.
        failed: the error that a step raised.
        within: the largest ratio to AdamW's loss at which the cell holds.
    """

    model: str
    checkpoint: str
    start: float
    adamw: float
    rate: float
    final: float | None
    nan: bool
    above: bool
    refused: bool
    said: tuple[str, ...]
    failed: str | None
    within: float

    @property
    def ratio(self) -> float | None:
        """The final loss over AdamW's."""
        return None if self.final is None else self.final / self.adamw

    @property
    def told(self) -> bool:
        """Whether a warning or error said that the checkpoint is not for the model; missing symmetries do not count."""
        return any("example_input" not in each and "symmetries=" not in each for each in self.said)

    @property
    def holds(self) -> bool:
        """Whether the cell holds."""
        if self.nan or self.above or self.failed is not None:
            return False
        return self.told or (self.ratio is not None and self.ratio <= self.within)


def _loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs, labels = model(batch[0]), batch[1]
    return nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def _evaluated(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        value = float(_loss_of(model, data))
    model.train()
    return value


def _trained(
    case: InUse, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, steps: int
) -> tuple[float, float, bool]:
    """The loss before and after training, and whether everything stayed finite."""
    torch.manual_seed(seed)
    model, data = case.build(), case.data()
    start = _evaluated(model, data)
    optimizer = make(model)
    draw = torch.Generator().manual_seed(seed)
    finite = True
    for _ in range(steps):
        taken = torch.randint(len(data[0]), (BATCH,), generator=draw)
        loss = _loss_of(model, (data[0][taken], data[1][taken]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        finite = finite and bool(torch.isfinite(loss))
    final = _evaluated(model, data)
    weights = all(bool(torch.isfinite(value).all()) for value in model.parameters())
    return start, final, finite and weights and math.isfinite(final)


def _adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW; with SparseAdam for parameters that have sparse gradients."""
    sparse = {id(part.weight) for part in model.modules() if getattr(part, "sparse", False)}
    trained = [value for value in model.parameters() if value.requires_grad]
    dense = torch.optim.AdamW([value for value in trained if id(value) not in sparse], lr=rate)
    if not sparse:
        return dense
    return _Both(dense, torch.optim.SparseAdam([value for value in trained if id(value) in sparse], lr=rate))


class _Both(torch.optim.Optimizer):
    """Two optimizers as one."""

    def __init__(self, *both: torch.optim.Optimizer) -> None:
        self.both = both

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.both:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.both:
            each.zero_grad(set_to_none)


def _reference(case: InUse, seeds: int, steps: int) -> tuple[float, float, float]:
    """The start, AdamW's best final loss and its rate."""
    best, rate, start = math.inf, math.nan, math.nan
    for each in RATES:
        runs = [_trained(case, functools.partial(_adamw, rate=each), seed, steps) for seed in range(seeds)]
        final = statistics.median(run[1] for run in runs)
        start = statistics.median(run[0] for run in runs)
        if final < best:
            best, rate = final, each
    return start, best, rate


class _Refused(Exception):
    """The optimizer could not be made; the message is the library's."""


def _line(said: object) -> str:
    return " ".join(str(said).split())


def _cell(case: InUse, checkpoint: str, reference: tuple[float, float, float], seeds: int, steps: int) -> Cell:
    said: dict[str, None] = {}
    runs: list[tuple[float, float, bool]] = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                optimizer = mt.LearnedOptimizer(model, checkpoint)
            except ValueError as error:
                raise _Refused(str(error)) from error
        said.update(dict.fromkeys(_line(each.message) for each in heard))
        return optimizer

    refused, failed = False, None
    try:
        runs = [_trained(case, make, seed, steps) for seed in range(seeds)]
    except _Refused as refusal:
        refused = True
        said[_line(refusal)] = None
    except Exception as error:
        failed = f"{type(error).__name__}: {_line(error)}"
    start, adamw, rate = reference
    return Cell(
        model=case.name,
        checkpoint=checkpoint,
        start=start,
        adamw=adamw,
        rate=rate,
        final=statistics.median(run[1] for run in runs) if runs else None,
        nan=any(not run[2] for run in runs),
        above=any(not run[1] < run[0] for run in runs),
        refused=refused,
        said=tuple(said),
        failed=failed,
        within=WITHIN_PERCEPTRON if case.perceptron else WITHIN,
    )


def _cells(models: Sequence[str], checkpoints: Sequence[str], seeds: int, steps: int) -> Iterator[Cell]:
    for name in models:
        reference = _reference(MODELS[name], seeds, steps)
        for checkpoint in checkpoints:
            yield _cell(MODELS[name], checkpoint, reference, seeds, steps)


_HEAD = "| model | checkpoint | start | AdamW (rate) | final | ratio | NaN | above its start | holds | said |\n" + (
    "|---" * 10 + "|"
)


def _row(cell: Cell) -> str:
    final = ("refused" if cell.refused else "failed") if cell.final is None else f"{cell.final:.3g}"
    ratio = "" if cell.ratio is None else f"{cell.ratio:.2f}"
    flags = ["yes" if value else "no" for value in (cell.nan, cell.above, cell.holds)]
    said = "; ".join([*cell.said, *([cell.failed] if cell.failed else [])])
    figures = [f"{cell.start:.3g}", f"{cell.adamw:.3g} ({cell.rate:g})", final, ratio, *flags, said]
    return f"| {' | '.join([cell.model, cell.checkpoint, *figures])} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table in Markdown, row by row; returns 1 if a cell does not hold."""
    steps_of = {name: path for name, path in shipped_checkpoints().items() if _learned_a_step(name)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--checkpoints", nargs="+", choices=steps_of, default=list(steps_of), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps of each run (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.steps < 1:
        parser.error("give at least one seed and one step")
    torch.set_num_threads(1)
    print(_HEAD, flush=True)
    cells = []
    for cell in _cells(given.models, given.checkpoints, given.seeds, given.steps):
        cells.append(cell)
        print(_row(cell), flush=True)
    failed = sum(not cell.holds for cell in cells)
    print(f"\n{len(cells) - failed} of {len(cells)} hold")
    if given.json is not None:
        report = {
            "schema": SCHEMA,
            "settings": {"batch": BATCH, "rates": RATES, "seeds": given.seeds, "steps": given.steps},
            "conditions": conditions(torch.device("cpu")),
            "cells": [
                {**dataclasses.asdict(cell), "ratio": cell.ratio, "told": cell.told, "holds": cell.holds}
                for cell in cells
            ],
        }
        write_json(given.json, report)
    return int(failed > 0)


def _learned_a_step(name: str) -> bool:
    return mt.load_checkpoint(name).learned.config.steps


if __name__ == "__main__":
    raise SystemExit(main())
