"""`metateleport promote`: registers a checkpoint in MLflow, under a name and an alias."""

from __future__ import annotations

import argparse
from typing import Any

from metateleport.cli.common import Parser, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport promote runs/mine --as champion        then: metateleport.load("models:/mine@champion")
  metateleport promote 3f2a...e1 --name lora          the checkpoint of a run, by the run's id
  metateleport promote models:/lora/3 --as champion   moves the alias
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "promote",
        help="register a checkpoint in MLflow, as champion or under another alias",
        description="Registers a checkpoint as a version of a model in MLflow, in the store that train writes to.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("what", metavar="RUN_OR_CHECKPOINT", help="a run's id, a checkpoint, runs:/... or models:/...")
    parser.add_argument("--as", dest="alias", metavar="ALIAS", help="an alias for it, as champion; it is moved")
    parser.add_argument("--name", help="name of the registered model (default: the checkpoint's)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.tracking import promote

    found = promote(arguments.what, arguments.name, arguments.alias, say)
    say(f"{found.name} version {found.version}" + (f" is {found.alias}" if found.alias else ""))
    print(found.address)
    return 0
