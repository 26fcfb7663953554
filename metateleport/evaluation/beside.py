"""A learned optimizer beside AdamW on one model: what a person sees first."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from metateleport.evaluation.beside_result import EVERY, Beside, Line
from metateleport.optim import LearnedOptimizer

__all__ = ["ADAMW", "RATES", "Contest", "beside"]

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates that AdamW is tried with."""

ADAMW = 1e-3
"""AdamW's default learning rate in torch."""

BATCH = 64

LONGEST = 30
"""How many times as many steps AdamW takes at most where it is given as many seconds."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """A model to train, and its data.

    Args:
        model: makes the model, from torch's global random numbers.
        train: inputs and labels that are trained on.
        held_out: inputs and labels that are not.
        words: what it is, for a title.
    """

    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    words: str


def beside(
    contest: Contest,
    checkpoint: str,
    steps: int = 200,
    seeds: int = 3,
    rates: Sequence[float] = RATES,
    doing: Callable[[str], None] = lambda _: None,
) -> Beside:
    """Trains a model by a learned optimizer, and from the same starts on the same batches by AdamW.

    The runs of a seed take turns, ten steps each, so that whatever else the machine does slows all of them alike. A
    run's seconds are those of its forward and backward passes and its steps, on one thread.

    Args:
        contest: model and data.
        checkpoint: the learned optimizer's; it is used with its default settings.
        steps: of each run; a multiple of ten.
        seeds: number of starts.
        rates: learning rates of AdamW; the default is added where it is missing.
        doing: called with what is being done.

    Returns:
        The medians over the seeds.

    Raises:
        ValueError: if the number of steps is not a positive multiple of ten.
        metateleport.checkpoint.CheckpointError: if the checkpoint cannot be loaded.

    Example:
        >>> x, y = torch.randn(90, 4), torch.randint(3, (90,))
        >>> contest = Contest(lambda: nn.Linear(4, 3), (x, y), (x, y), "noise")
        >>> result = beside(contest, "digits", steps=20, seeds=1, rates=[0.01])
        >>> [line.name for line in result.lines]
        ['LearnedOptimizer', 'AdamW, default', 'AdamW, tuned']
    """
    if steps < EVERY or steps % EVERY:
        raise ValueError(f"the number of steps has to be a multiple of {EVERY}, not {steps}")
    threads = torch.get_num_threads()
    # For models that take milliseconds more threads cost more than they gain, above all where others use the machine.
    torch.set_num_threads(1)
    try:
        return _beside(contest, checkpoint, steps, seeds, rates, doing)
    finally:
        torch.set_num_threads(threads)


def _beside(
    contest: Contest, checkpoint: str, steps: int, seeds: int, rates: Sequence[float], doing: Callable[[str], None]
) -> Beside:
    rates = sorted({*rates, ADAMW})
    runs: dict[str | float, list[_Run]] = {"learned": [], **{rate: [] for rate in rates}}
    warned: list[str] = []
    for seed in range(seeds):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            runs["learned"].append(_Run(contest, seed, lambda model: LearnedOptimizer(model, checkpoint)))
        warned += [str(each.message) for each in heard if str(each.message) not in warned]
        for rate in rates:
            runs[rate].append(_Run(contest, seed, partial(_adamw, rate)))
        for done in range(0, steps, EVERY):
            doing(f"seed {seed + 1} of {seeds}: step {done} of {steps} of {len(runs)} runs")
            for each in runs.values():
                each[-1].advance()
    best = min(rates, key=lambda rate: _median(runs[rate], "loss")[-1])
    for ours, theirs in zip(runs["learned"], runs[best], strict=True):
        while theirs.seconds_so_far < ours.seconds_so_far and theirs.step < LONGEST * steps:
            doing(f"AdamW, tuned, for as many seconds: step {theirs.step}")
            theirs.advance()
    return Beside(
        contest=contest.words,
        checkpoint=checkpoint,
        learned=_line("LearnedOptimizer", runs["learned"]),
        default=_line("AdamW, default", runs[ADAMW]),
        tuned=_line("AdamW, tuned", runs[best]),
        rate=best,
        seeds=seeds,
        warned=tuple(warned),
    )


class _Run:
    """One optimizer on one start: it is advanced ten steps at a time."""

    def __init__(self, contest: Contest, seed: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.contest, self.seconds_so_far = contest, 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = contest.model()
        self.optimizer = make(self.model)
        self.draws = torch.Generator().manual_seed(seed)
        self.looked: dict[str, list[float]] = {"steps": [], "seconds": [], "loss": [], "accuracy": []}
        self.step = 0
        self._look()

    def advance(self) -> None:
        """Ten steps, and a look at the model."""
        inputs, labels = self.contest.train
        for _ in range(EVERY):
            drawn = torch.randint(len(inputs), (BATCH,), generator=self.draws)
            batch, told = inputs[drawn], labels[drawn]
            begun = time.perf_counter()
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(batch), told).backward()
            self.optimizer.step()
            self.seconds_so_far += time.perf_counter() - begun
        self.step += EVERY
        self._look()

    @torch.no_grad()
    def _look(self) -> None:
        self.model.eval()
        inputs, labels = self.contest.train
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        inputs, labels = self.contest.held_out
        right = (self.model(inputs).argmax(-1) == labels).float().mean()
        self.model.train()
        now: Mapping[str, float] = {
            "steps": self.step,
            "seconds": self.seconds_so_far,
            "loss": float(loss),
            "accuracy": float(right),
        }
        for key, value in now.items():
            self.looked[key].append(value)


def _adamw(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def _median(runs: Sequence[_Run], key: str) -> tuple[float, ...]:
    # Given as many seconds, the seeds take different numbers of steps.
    return tuple(statistics.median(values) for values in zip(*(run.looked[key] for run in runs), strict=False))


def _line(name: str, runs: Sequence[_Run]) -> Line:
    seconds, loss, accuracy = (_median(runs, key) for key in ("seconds", "loss", "accuracy"))
    return Line(name, tuple(EVERY * number for number in range(len(loss))), seconds, loss, accuracy)
