"""What became of a learned optimizer beside AdamW: a table, a sentence, a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metateleport.evaluation.style import BLUE, SKY, VERMILLION, bare, new_figure, save, suptitle

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EVERY", "Beside", "Line"]

EVERY = 10
"""Steps between two looks at the losses."""


@dataclasses.dataclass(frozen=True)
class Line:
    """The course of one optimizer: medians over seeds.

    Args:
        name: what it is called.
        steps: the steps at which it was looked at.
        seconds: what its own passes and steps had taken by then.
        loss: the loss on all training data, in evaluation mode.
        accuracy: the share of held-out labels that were told.
    """

    name: str
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    def at(self, step: int) -> float:
        """The loss at a step at which it was looked at."""
        return self.loss[self.steps.index(step)]

    def at_seconds(self, seconds: float) -> float:
        """The loss where it was looked at last before so many seconds."""
        return [loss for took, loss in zip(self.seconds, self.loss, strict=True) if took <= seconds][-1]

    def steps_to(self, loss: float) -> int | None:
        """The first step at which the loss was as low; None if it never was."""
        return next((step for step, value in zip(self.steps, self.loss, strict=True) if value <= loss), None)


@dataclasses.dataclass(frozen=True)
class Beside:
    """What became of a contest.

    Args:
        contest: the contest's words.
        checkpoint: name of the learned optimizer's checkpoint.
        learned: the learned optimizer's line; nothing of it was tuned.
        default: AdamW's with torch's defaults.
        tuned: AdamW's at the learning rate whose training loss is lowest at the learned optimizer's last step; it goes
            on from there for as many seconds as the learned optimizer has taken.
        rate: that learning rate.
        seeds: number of seeds.
        warned: what the learned optimizer said when it was made.
    """

    contest: str
    checkpoint: str
    learned: Line
    default: Line
    tuned: Line
    rate: float
    seeds: int
    warned: tuple[str, ...]

    @property
    def lines(self) -> tuple[Line, Line, Line]:
        return self.learned, self.default, self.tuned

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {"schema": 1, **dataclasses.asdict(self), "in_words": self.words()}

    def table(self) -> Table:
        """Losses by step, accuracy, and the price of a step."""
        from rich.table import Table

        marks = _marks(self.learned.steps[-1])
        table = Table(title=self.contest, title_justify="left")
        table.add_column("optimizer")
        for mark in marks:
            table.add_column(f"loss at {mark}", justify="right")
        for words in ("held-out accuracy", "seconds", "ms a step"):
            table.add_column(words, justify="right")
        for line in self.lines:
            losses = [f"{line.at(mark):.3g}" for mark in marks]
            place = line.steps.index(marks[-1])
            price = 1e3 * line.seconds[place] / marks[-1]
            table.add_row(
                line.name, *losses, f"{line.accuracy[place]:.1%}", f"{line.seconds[place]:.1f}", f"{price:.1f}"
            )
        return table

    def words(self) -> str:
        """One sentence by step, one by second: whoever is ahead."""
        last = self.learned.steps[-1]
        ours, theirs = self.learned.loss[-1], self.tuned.at(last)
        reached = self.learned.steps_to(theirs)
        if reached is not None:
            by_step = f"the learned optimizer, not tuned, is at step {reached} where AdamW, tuned, is at {last}"
        else:
            by_step = f"AdamW, tuned, is ahead at step {last}: {theirs:.2g} against {ours:.2g}"
        price = self.learned.seconds[-1] / self.tuned.seconds[self.tuned.steps.index(last)]
        there = min(self.learned.seconds[-1], self.tuned.seconds[-1])
        learned, tuned = self.learned.at_seconds(there), self.tuned.at_seconds(there)
        ahead = "the learned one" if learned < tuned else "AdamW, tuned,"
        return (
            f"By step, {by_step}. By second, a learned step on this small model takes {price:.1f} times as long, and "
            f"after {there:.1f} s of each {ahead} is ahead: training loss {min(learned, tuned):.2g} against "
            f"{max(learned, tuned):.2g}."
        )

    def draw(self, path: str | Path) -> None:
        """Draws the training loss by step and by second, each line with its name beside it.

        Raises:
            ValueError: if matplotlib does not write the suffix's format.
        """
        figure = new_figure(9.5, 4.0)
        by_step, by_second = figure.subplots(1, 2, sharey=True)
        colours = {self.learned.name: VERMILLION, self.default.name: SKY, self.tuned.name: BLUE}
        for axes, key in ((by_step, "steps"), (by_second, "seconds")):
            for line in reversed(self.lines):
                wide = 2.4 if line is self.learned else 1.5
                axes.plot(getattr(line, key), line.loss, color=colours[line.name], linewidth=wide)
            bare(axes)
        last = self.learned.steps[-1]
        by_step.set(yscale="log", xlabel="step", ylabel="training loss", xlim=(0, last))
        by_second.set(xlabel="seconds of its own", xlim=(0, None))
        ends = _apart([line.at(last) for line in self.lines], by_step.get_ylim())
        for line, height in zip(self.lines, ends, strict=True):
            by_step.annotate(
                line.name,
                (last, height),
                xytext=(4, 0),
                textcoords="offset points",
                color=colours[line.name],
                va="center",
                fontsize=9,
            )
        suptitle(figure, f"{self.contest}: median of {self.seeds} seeds")
        save(figure, path)


def _apart(heights: Sequence[float], limits: tuple[float, float], share: float = 0.06) -> list[float]:
    """Positions on a logarithmic axis near some heights, at least a share of the axis from each other."""
    low, high = (math.log(limit) for limit in limits)
    placed: dict[int, float] = {}
    below = -math.inf
    for number in sorted(range(len(heights)), key=lambda each: heights[each]):
        placed[number] = below = max(math.log(heights[number]), below + share * (high - low))
    return [math.exp(placed[number]) for number in range(len(heights))]


def _marks(steps: int) -> list[int]:
    """Some of the steps that were looked at, the last among them."""
    looked = range(EVERY, steps + 1, EVERY)
    return sorted({looked[max(0, round(share * len(looked)) - 1)] for share in (1 / 8, 1 / 4, 1 / 2, 1)})
