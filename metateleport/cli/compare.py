"""`metateleport compare`: the evaluations that MLflow has, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from metateleport.cli.common import Parser, UsageError, say

if TYPE_CHECKING:
    from metateleport.tracking.compared import Compared

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport compare digits                         every method of every evaluation on digits, the best first
  metateleport compare digits --methods learned       checkpoints against each other
  metateleport compare --json | jq '.[0]'
  metateleport compare digits --png digits.png        their curves
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "compare",
        help="the evaluations that MLflow has, side by side",
        description="Compares all evaluations in the store that evaluate writes to: those of one task and one set of "
        "settings stand together, the best first.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("task", nargs="?", help="task family (default: all)")
    parser.add_argument("--methods", metavar="A,B", help="only these methods, separated by commas")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves of a task: png, svg or pdf")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.tracking import check_tracking
    from metateleport.tracking.compared import compare, draw_compared

    if arguments.png is not None and arguments.png.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--png writes png, svg or pdf, by the file's suffix; not {str(arguments.png)!r}")
    check_tracking()
    rows = compare(arguments.task)
    if arguments.methods:
        names = [each.strip() for each in arguments.methods.split(",") if each.strip()]
        known = sorted({each.method for each in rows})
        for name in names:
            if name not in known:
                raise UsageError(f"no evaluation has the method {name!r}: there are {', '.join(known)}")
        rows = [each for each in rows if each.method in names]
    if arguments.png is not None and len({each.task for each in rows}) > 1:
        raise UsageError("--png draws one task: name it, as in metateleport compare digits --png digits.png")
    if arguments.json:
        print(json.dumps([each.table() for each in rows], indent=2))
    else:
        _show(rows)
    if arguments.png is not None:
        draw_compared(rows, arguments.png)
        say(f"wrote {arguments.png}")
    return 0


def _show(rows: Sequence[Compared]) -> None:
    console = Console(width=None if Console().is_terminal else 160)
    for (task, settings), group in groupby(rows, key=lambda each: (each.task, tuple(sorted(each.settings.items())))):
        table = Table(box=box.SIMPLE, title=task, title_justify="left")
        table.add_column("method")
        table.add_column("checkpoint")
        for name in ("final median", "over learned", "diverged", "seconds"):
            table.add_column(name, justify="right")
        table.add_column("when (UTC)")
        table.add_column("run")
        for each in group:
            figures = [each.figures.get(f"final_{key}") for key in ("median", "ratio_to_learned")]
            figures += [each.figures.get("diverged"), each.figures.get("seconds")]
            shown = ["" if value is None else f"{value:.3g}" for value in figures]
            table.add_row(each.method, each.checkpoint, *shown, each.when, each.run[:8])
        console.print(table)
        said = ", ".join(f"{name.removeprefix('task.')}={value}" for name, value in settings)
        console.print(said, style="dim", markup=False, highlight=False)
