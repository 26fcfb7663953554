"""`metateleport report`: pages of results, from cards and evaluations alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metateleport.cli.common import Parser, UsageError, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport report                                    all shipped checkpoints, into docs/results
  metateleport report --extract README.md                and the extract between the marks of README.md
  metateleport report runs/mine --out runs/mine-results  one of your own
  metateleport report runs/mine --evaluation a.json --evaluation b.json --out pages    with results of evaluate --json

Every sentence and figure is made of what the cards and files hold; equal ones give equal files. The extract stands
between the lines <!-- results: begin --> and <!-- results: end -->.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "report",
        help="write pages of results from checkpoints' cards and evaluations",
        description="Writes an index, a page and a picture for each checkpoint, from cards and evaluations alone.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="folders or bare names (default: shipped)")
    parser.add_argument(
        "--evaluation",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="also what evaluate --json wrote, on its checkpoint's page",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), metavar="FOLDER", help="where to (default %(default)s)"
    )
    parser.add_argument("--extract", type=Path, metavar="FILE", help="also write the extract between this file's marks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint import load_checkpoint, shipped_checkpoints
    from metateleport.evaluation.pages import write_pages

    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is a file: --out takes a folder")
    names = arguments.checkpoints or ([] if arguments.evaluation else list(shipped_checkpoints()))
    written = write_pages(
        arguments.out, [load_checkpoint(name) for name in names], arguments.evaluation, arguments.extract
    )
    for path in written.changed:
        say(f"wrote {path}")
    if not written.changed:
        say(f"{arguments.out} is as it was: nothing that it is made of has changed")
    for path in written.strangers:
        say(f"{path} is of no checkpoint that was given, and stays as it is")
    return 0
