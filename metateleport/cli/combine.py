"""`metateleport combine`: combines checkpoints of different meta-seeds into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metateleport.cli.common import Parser, UsageError, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport train leaky_mlp --seed 0 --out runs/s0        in one process
  metateleport train leaky_mlp --seed 1 --out runs/s1        in another
  metateleport combine runs/s0 runs/s1 --out runs/both       what train --meta-seeds 2 would have made
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "combine",
        help="combine checkpoints of several meta-seeds into one",
        description="Combines checkpoints that were trained by the same recipe from different seeds into one: the one "
        "with the best validation score, with the others in its folder meta_seeds.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoints", nargs="+", help="folders of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the checkpoint to write")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint import load_checkpoint
    from metateleport.checkpoint.seeds import combine_meta_seeds

    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is a file, but a checkpoint is a folder: choose another --out")
    path = combine_meta_seeds(arguments.checkpoints, arguments.out)
    scores = ", ".join(f"{each.seed}: {each.validation:.3g}" for each in load_checkpoint(path).meta_seeds)
    say(f"wrote the checkpoint {path}; validation scores by seed: {scores}")
    return 0
