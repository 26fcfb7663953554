"""`metateleport seal`: writes the cards of checkpoints in today's schema, under a digest."""

from __future__ import annotations

import argparse
from typing import Any

from metateleport.cli.common import Parser, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport seal runs/old              a checkpoint of an earlier version, whose card has no digest yet
  metateleport seal checkpoints/*         several of them
  metateleport seal --edited runs/mine    after its card was edited by hand

A card's digest tells entries that were damaged or edited from those that were written, and loading names them. The
entries 'limits' and 'notes', lists of texts, may be edited at any time. Every other entry is checked, and its weights
are held against it, before a card is written. The weights are not touched.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "seal",
        help="write a checkpoint's card in today's schema, under a digest",
        description="Writes the cards of checkpoints and of their meta-seeds in today's schema, each under a digest.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoints", nargs="+", help="folders or bare names of checkpoints")
    parser.add_argument("--edited", action="store_true", help="accept entries that were edited by hand")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint import seal

    for each in arguments.checkpoints:
        written = seal(each, arguments.edited)
        for folder in written:
            say(f"wrote the card of {folder}")
        if not written:
            say(f"{each} is as it should be")
    return 0
