"""Which cells there are, and the table of their verdicts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

from covering import pairwise

from .cells import CHECKPOINTS, SYMBOLS, Cell, Verdict, judge
from .models import PROBLEMS
from .registry import IDIOMS

__all__ = ["MOST_REFUSALS", "Table", "brief", "chosen", "covering", "is_tried"]

MOST_REFUSALS = 2
"""How many checkpoints may refuse the perceptron."""


def covering(checkpoints: Sequence[str] = CHECKPOINTS, device: str = "cpu") -> list[Cell]:
    """Cells in which every idiom meets every model and every checkpoint, and every model every checkpoint."""
    return [Cell(*row, device) for row in pairwise(list(IDIOMS), list(PROBLEMS), checkpoints)]


def brief(device: str = "cpu") -> list[Cell]:
    """What takes most of a minute: every idiom with `default`, and every model with every checkpoint in some idiom."""
    problems, others = list(PROBLEMS), [name for name in CHECKPOINTS if name != "default"]
    own = [Cell(idiom, problems[row % len(problems)], "default", device) for row, idiom in enumerate(IDIOMS)]
    turn = itertools.cycle(IDIOMS)
    # Neighbours are of different checkpoints, so that every idiom meets several in the end.
    pairs = itertools.product(problems, others)
    return own + [
        Cell(next(each for each in turn if is_tried(each, problem)), problem, name, device) for problem, name in pairs
    ]


def is_tried(idiom: str, problem: str) -> bool:
    """Whether an idiom is for a model at all."""
    leaves_out = IDIOMS[idiom].leaves_out
    return leaves_out is None or leaves_out(PROBLEMS[problem]) is None


def chosen(
    idioms: Sequence[str] | None,
    models: Sequence[str] | None,
    checkpoints: Sequence[str] | None,
    device: str,
    *,
    covered: bool = False,
) -> list[Cell]:
    """The cells whose row and column have one of the words in their names; all of them if no word is given."""

    def having(names: Sequence[str], words: Sequence[str] | None) -> list[str]:
        return [name for name in names if words is None or any(word in name for word in words)]

    rows, columns = having(list(IDIOMS), idioms), having(list(PROBLEMS), models)
    held = CHECKPOINTS if checkpoints is None else checkpoints
    if covered:
        return [cell for cell in covering(held, device) if cell.idiom in rows and cell.problem in columns]
    return [Cell(*names, device) for names in itertools.product(rows, columns, held)]


class Table:
    """Runs cells row by row.

    Args:
        cells: those to run.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.idioms = list(dict.fromkeys(cell.idiom for cell in cells))
        self.columns = [name for name in PROBLEMS if any(cell.problem == name for cell in cells)]
        self.checkpoints = list(dict.fromkeys(cell.checkpoint for cell in cells))
        self.verdicts: dict[Cell, Verdict] = {}
        self.began = time.monotonic()

    def rows(self) -> Iterator[str]:
        """The table's lines, each as soon as its cells have run."""
        yield "checkpoints in the order of the signs: " + ", ".join(self.checkpoints)
        yield "signs: " + ", ".join(f"{sign} {kind}" for kind, sign in SYMBOLS.items()) + "\n"
        width = max(len(name) for name in self.idioms)
        widths = [max(len(name), len(self.checkpoints)) for name in self.columns]
        heads = (name.ljust(wide) for name, wide in zip(self.columns, widths, strict=True))
        yield "  ".join(["".ljust(width), *heads])
        held = set(self.cells)
        device = self.cells[0].device
        for idiom in self.idioms:
            shown = []
            for problem, wide in zip(self.columns, widths, strict=True):
                signs = ""
                for checkpoint in self.checkpoints:
                    cell = Cell(idiom, problem, checkpoint, device)
                    if cell in held:
                        self.verdicts[cell] = judge(cell)
                        signs += self.verdicts[cell].symbol
                    else:
                        signs += " "
                shown.append(signs.ljust(wide))
            yield "  ".join([idiom.ljust(width), *shown])

    @property
    def wrong(self) -> bool:
        """Whether a cell is wrong, or too many checkpoints refuse the perceptron."""
        return any(verdict.kind == "wrong" for verdict in self.verdicts.values()) or self._too_many_refusals

    @property
    def _too_many_refusals(self) -> bool:
        refused = {
            cell.checkpoint
            for cell, verdict in self.verdicts.items()
            if cell.problem == "mlp" and cell.idiom == "step()" and verdict.kind == "refused"
        }
        return len(refused) > MOST_REFUSALS

    def footer(self) -> list[str]:
        """What was refused, left out and wrong, each sentence once with the cells it is from."""
        lines = []
        for kind in ("left out", "refused", "wrong"):
            said: dict[str, list[Cell]] = {}
            for cell, verdict in self.verdicts.items():
                if verdict.kind == kind:
                    said.setdefault(verdict.why, []).append(cell)
            if said:
                lines.append(f"\n{kind}:")
            for sentence, cells in said.items():
                first = " | ".join([cells[0].idiom, cells[0].problem, cells[0].checkpoint])
                lines.append(f"  {first}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {sentence}")
        if self._too_many_refusals:
            lines.append(f"\nwrong: more than {MOST_REFUSALS} checkpoints refuse the perceptron")
        counts = {kind: sum(verdict.kind == kind for verdict in self.verdicts.values()) for kind in SYMBOLS}
        seconds = time.monotonic() - self.began
        lines.append("\n" + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + f", in {seconds:.0f} s")
        return lines
