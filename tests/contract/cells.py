"""How a cell of the table is judged."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from pathlib import Path

import torch

import metateleport

from . import idioms  # noqa: F401
from .loops import Bench, Course
from .models import PROBLEMS
from .registry import IDIOMS, TOLERANCE, Outcome, apart
from .stand_in import ADAMW, GAUGED

__all__ = ["CHECKPOINTS", "SERVES_ALL", "Cell", "Verdict", "judge"]

SERVES_ALL = ("default", "digits", ADAMW, GAUGED)
"""Checkpoints that may refuse nothing."""
_NOT_MADE_FOR = "is not made for this"
_AT_MOST = 1.5
"""How far the loss may rise over the first steps of what said that it is not made for a model."""

SYMBOLS = {"works": "+", "refused": "r", "wrong": "X", "left out": "."}
_OWN = Path(metateleport.__file__).parent


def _with_a_step() -> tuple[str, ...]:
    found = metateleport.checkpoint.shipped_checkpoints()
    return tuple(name for name in sorted(found) if metateleport.load_checkpoint(name).learned.config.steps)


CHECKPOINTS = _with_a_step()
"""The shipped checkpoints that learned a step."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """An idiom, a model and a checkpoint."""

    idiom: str
    problem: str
    checkpoint: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.idiom} | {self.problem} | {self.checkpoint}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a cell `works`, was `refused` in the library's own words, is `wrong` or `left out`; and why."""

    kind: str
    why: str = ""

    @property
    def symbol(self) -> str:
        """Its sign in the table."""
        return SYMBOLS[self.kind]


def judge(cell: Cell) -> Verdict:
    """Runs a cell and judges it."""
    row, problem = IDIOMS[cell.idiom], PROBLEMS[cell.problem]
    without = row.leaves_out(problem) if row.leaves_out else None
    if without is not None:
        return Verdict("left out", without)
    bench = Bench(problem, cell.checkpoint, cell.device)
    try:
        outcome = row.run(bench)
        wrong = _wrong(outcome, low=row.precision)
        if wrong is None and not outcome.tried.after < outcome.tried.before:
            return _did_not_fall(cell, outcome.tried)
    except AssertionError as error:
        if _raised_by_the_library(error):
            return Verdict("wrong", f"internal AssertionError: {_line(error)}")
        return Verdict("wrong", _line(error))
    except Exception as error:
        wrong = _not_a_refusal(error, bench)
        if wrong is None:
            return _refused(cell, row.precision, _line(error))
    return Verdict("works") if wrong is None else Verdict("wrong", wrong)


def _wrong(outcome: Outcome, low: bool) -> str | None:
    tried = outcome.tried
    still = [k for k, trained in enumerate(tried.trained) if trained and _equal(tried, k)]
    if not any(tried.trained):
        return "no weight had a gradient"
    if len(still) == sum(tried.trained) or (still and not low):
        shapes = ", ".join(str(tuple(tried.start[k].shape)) for k in still)
        return f"weights that have gradients did not move: {shapes}"
    if outcome.references:
        differences = [apart(tried.weights, each.weights) for each in outcome.references]
        if min(differences) > TOLERANCE:
            return f"{min(differences):.1e} apart from the reference idiom"
    return None


def _did_not_fall(cell: Cell, tried: Course) -> Verdict:
    """A loss that did not fall: refused where the optimizer said when it was made that it is not made for this."""
    said = [each for each in tried.said if _NOT_MADE_FOR in each]
    if said and cell.checkpoint not in SERVES_ALL and tried.after < _AT_MOST * abs(tried.before):
        return Verdict("refused", " ".join(said[0].split()))
    return Verdict("wrong", f"the loss went from {tried.before:.4g} to {tried.after:.4g}")


def _equal(course: Course, number: int) -> bool:
    return torch.equal(course.weights[number], course.start[number])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _raised_by_the_library(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_OWN)


def _not_a_refusal(error: Exception, bench: Bench) -> str | None:
    """None if an error is the library's own sentence, raised before anything moved; else what is wrong with it."""
    said = f"{type(error).__name__}: {_line(error)[:160]}"
    if not _raised_by_the_library(error):
        frames = traceback.extract_tb(error.__traceback__)
        inner = [each for each in frames if Path(each.filename).is_relative_to(_OWN)] or frames
        return f"not the library's own sentence: {said} ({Path(inner[-1].filename).name}:{inner[-1].lineno})"
    if not isinstance(error, ValueError) or len(_line(error)) < 20:
        return f"no refusal, which is a ValueError with a sentence: {said}"
    if any(loop.moved() for loop in bench.loops):
        return f"refused after the weights had moved: {said}"
    return None


def _refused(cell: Cell, precision: bool, sentence: str) -> Verdict:
    if cell.checkpoint in SERVES_ALL:
        return Verdict("wrong", f"{cell.checkpoint} may refuse nothing: {sentence}")
    if not precision and _serves(cell.problem, cell.checkpoint, cell.device):
        return Verdict("wrong", f"refused in this idiom and served in plain steps: {sentence}")
    return Verdict("refused", sentence)


@functools.cache
def _serves(problem: str, checkpoint: str, device: str) -> bool:
    """Whether a checkpoint takes plain steps on a problem."""
    try:
        Bench(PROBLEMS[problem], checkpoint, device).plain(steps=1)
    except ValueError:
        return False
    return True
