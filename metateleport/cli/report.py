"""`metateleport report`: writes pages of results from cards and evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metateleport.cli.common import Parser, UsageError, say
from metateleport.cli.progress import status

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport report                                    all shipped checkpoints, to docs/results
  metateleport report --extract docs/choose.md           also the extract between that file's marks
  metateleport report runs/mine --out runs/mine-results  a checkpoint of your own
  metateleport report runs/mine --evaluation a.json --evaluation b.json --out pages    with results of evaluate --json

Every sentence and figure comes from the cards and files; the same input gives the same pages. The extract is written
between the lines <!-- results: begin --> and <!-- results: end -->.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "report",
        help="write pages of results from checkpoints' cards and evaluations",
        description="Writes an index, and a page and a picture for each checkpoint, from cards and evaluations.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="folders or bare names (default: shipped)")
    parser.add_argument(
        "--evaluation",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a file that evaluate --json wrote, to add to its checkpoint's page",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), metavar="FOLDER", help="folder to write (default %(default)s)"
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
    with status("writing pages and pictures"):
        written = write_pages(
            arguments.out, [load_checkpoint(name) for name in names], arguments.evaluation, arguments.extract
        )
    for path in written.changed:
        say(f"wrote {path}")
    if not written.changed:
        say(f"{arguments.out} is up to date: nothing was written")
    for path in written.strangers:
        say(f"{path} belongs to none of the given checkpoints and was left as it is")
    return 0
