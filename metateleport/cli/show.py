"""`metateleport show`: a checkpoint's card, for people."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from metateleport.cli.common import Parser

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport show digits                 a shipped checkpoint
  metateleport show models:/digits@champion --json
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "show",
        help="a checkpoint's card: what it is for, how it was trained, what it has shown, its limits",
        description="Prints a checkpoint's card for people.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoint", help="bare name, folder, runs:/... or models:/...")
    parser.add_argument("--json", action="store_true", help="print the whole card as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint import load_checkpoint
    from metateleport.checkpoint.shown import card_in_words

    checkpoint = load_checkpoint(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(checkpoint.card, indent=2))
        return 0
    console = Console()
    words = card_in_words({"name": checkpoint.name, **checkpoint.card})
    if console.is_terminal:
        console.print(Markdown(words))
    else:
        print(words)
    return 0
