"""`metateleport reproduce`: reproduces the source paper's learned teleportation."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from metateleport.cli.common import Parser, UsageError, check_files, not_negative, positive, say, settings_of
from metateleport.cli.progress import status

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport reproduce figure-6 --json figure_6.json --png figure_6.png
  metateleport reproduce figure-6 --read figure_6.json --page tables.md    tables of finished results
  metateleport reproduce figure-6 --runs 50 --tasks 8 --evaluations 30     a shorter run
  metateleport reproduce figure-6 --stack 1 --runs 700                     a meta-step for each run, as in the paper

All meta-seeds are trained side by side. The default takes about ten minutes on one idle core. Most of the time goes
into meta-steps; there are runs * steps / (stack * unroll) of them for each of four networks.
"""
_NUMBERS = {
    "seeds": "meta-seeds of every network, at least 2",
    "runs": "training runs of each network, one task each",
    "stack": "runs that share a meta-step",
    "steps": "inner steps of a training run",
    "unroll": "inner steps of one meta-step",
    "hidden": "units of the LSTMs",
    "tasks": "held-out tasks",
    "evaluations": "gradient evaluations on each held-out task",
}


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "reproduce",
        help="reproduce a figure of the source paper",
        description="Meta-trains the source paper's networks on its task, and evaluates them with their attribution: "
        "tables, sentences, JSON and picture.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("figure", choices=("figure-6",), help="which figure")
    for name, words in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=words)
    parser.add_argument("--seed", type=not_negative, metavar="S", help="the first meta-seed")
    parser.add_argument("--task", default="leaky_mlp", help="task family (default: the paper's, %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the task family")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write tables and findings as Markdown")
    parser.add_argument("--read", type=Path, metavar="FILE", help="show the results that --json wrote; run nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.families import load_family
    from metateleport.files import write_json, write_text
    from metateleport.papers.reproduction import Figure6, draw, figure_6, page_of, sentences_of, tables_of

    if arguments.png is not None and arguments.png.suffix != ".png":
        raise UsageError(f"--png writes a file that ends in .png; not {str(arguments.png)!r}")
    check_files(arguments.json, arguments.png, arguments.page)
    names = [field.name for field in dataclasses.fields(Figure6)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    if arguments.read is not None:
        if given or arguments.set or arguments.json:
            raise UsageError("--read shows finished results: it takes --png and --page, and no settings or --json")
        result = _read(arguments.read)
    else:
        settings, family = Figure6(**given), load_family(arguments.task, settings_of(arguments.set))
        with status("starting") as doing:
            result = figure_6(family, settings, doing)
    console = Console()
    for table in tables_of(result):
        Console(width=None if console.is_terminal else 160).print(table)
    for sentence in sentences_of(result):
        Console(highlight=False, soft_wrap=True).print(sentence, markup=False)
    if arguments.json is not None:
        write_json(arguments.json, result)
        say(f"wrote {arguments.json}")
    if arguments.png is not None:
        draw(result, arguments.png)
        say(f"wrote {arguments.png}")
    if arguments.page is not None:
        write_text(arguments.page, page_of(result, "Tables of figure 6"))
        say(f"wrote {arguments.page}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--read {path}: {error}") from error
    if not (isinstance(result, dict) and {"networks", "collapsed"} <= set(result)):
        raise UsageError(f"--read {path}: not the results of reproduce --json")
    return result
