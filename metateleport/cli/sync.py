"""`metateleport sync`: sends to MLflow what runs could not."""

from __future__ import annotations

import argparse
from typing import Any

from metateleport.cli.common import Parser, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport sync                        sends what was kept, and says what is still waiting
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "sync",
        help="send to MLflow what runs have kept while its store could not be reached",
        description="Sends to MLflow what runs have kept on disk while its store could not be reached, each to the "
        "store that it was meant for; and ends the runs of processes that were killed. Runs that go on are left alone.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Runs the command; the exit code is 1 if something could not be sent."""
    from metateleport.tracking import require_mlflow, synchronise

    require_mlflow()
    found = synchronise(say)
    for run_id in found.sent:
        say(f"sent the run {run_id}")
    for folder, why in found.left.items():
        say(f"not sent: {folder} ({why})")
    if not found.sent and not found.left:
        say("nothing is waiting to be sent")
    return 1 if found.left else 0
