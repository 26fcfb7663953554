"""`metateleport demo`: a learned optimizer beside AdamW within a minute, then a meta-training of one's own."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from metateleport.cli import evaluate, train
from metateleport.cli.common import Parser, UsageError, check_files, positive, say
from metateleport.cli.progress import status

if TYPE_CHECKING:
    from metateleport.evaluation.beside import Contest

__all__ = ["CHECKPOINT", "add"]

CHECKPOINT = "digits"
"""The shipped checkpoint that a person meets first."""

_EXAMPLES = """\
examples:
  metateleport demo                          everything, under six minutes
  metateleport demo --first                  a shipped checkpoint beside AdamW, under a minute
  metateleport demo --seconds 600            with a longer meta-training
  metateleport demo --first --json a.json    its curves, for a program

First a shipped checkpoint trains a perceptron on scikit-learn's handwritten digits, beside AdamW from the same starts
on the same batches. Then the demo gives two commands that you can give yourself: one that meta-trains a small
teleporter, and one that evaluates it, with its attribution, on tasks that it has never seen.
"""

_RECIPE = (
    *("rule.kind=adaptive", "rule.cooling=0.01", "teleport.max_stretch=2", "outer.lr=2e-3"),
    *("outer.tasks=8", "outer.horizon=60", "validation.tasks=8"),
)
_METHODS = "learned,learned/teleport-off,learned/random-teleport,learned/step-only,adam"


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "demo",
        help="see a learned optimizer beside AdamW, then train one of your own",
        description="Shows a learned optimizer beside AdamW on real data, then meta-trains another and evaluates it.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--first", action="store_true", help="only the first part: no meta-training")
    parser.add_argument(
        "--checkpoint", default=CHECKPOINT, metavar="NAME", help="what to show first (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=120, metavar="T", help="how long to meta-train (default %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where to write (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curves of the first part as JSON")
    parser.add_argument("--no-track", action="store_true", help="leave MLflow out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    begun = time.monotonic()
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is a file, and the demo writes a folder: choose another --out")
    check_files(arguments.json, arguments.out / "beside.png")
    if not (arguments.no_track or arguments.first):
        from metateleport.tracking import check_tracking

        check_tracking()
    import torch

    # Its models are small, and where others use the machine too, threads that wait for each other cost minutes.
    torch.set_num_threads(1)
    say(f"1. The shipped checkpoint {arguments.checkpoint!r} beside AdamW, a few seconds")
    _first(arguments)
    if arguments.first:
        return 0
    tracked = ["--no-track"] if arguments.no_track else []
    checkpoint = str(arguments.out / "digits")
    # What an earlier demo left unfinished would be refused.
    shutil.rmtree(f"{checkpoint}.unfinished", ignore_errors=True)
    say(f"\n2. A small teleporter of your own, meta-trained for {arguments.seconds} s on tasks made of such digits")
    training = ["train", "digits", "--set", *_RECIPE, "--seconds", str(arguments.seconds), "--out", checkpoint]
    code = _give([*training, *tracked])
    if code:
        return code
    say("\n3. What it has learned, on tasks that it has never seen, and which part of it brings that")
    files = ["--json", f"{checkpoint}.json", "--plot", f"{checkpoint}.png"]
    code = _give(["evaluate", checkpoint, "digits", "--tasks", "8", "--methods", _METHODS, *files, *tracked])
    say(f"\nThe demo took {time.monotonic() - begun:.0f} seconds. What it wrote is in {arguments.out}.")
    if not arguments.no_track:
        say("Open its MLflow runs: metateleport ui")
    return code


def _first(arguments: argparse.Namespace) -> None:
    """Shows the checkpoint beside AdamW."""
    from metateleport.evaluation.beside import beside
    from metateleport.files import write_json

    with status("reading the digits") as doing:
        result = beside(digits(), arguments.checkpoint, doing=doing)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(result.table())
    Console(highlight=False, soft_wrap=True).print(result.words(), markup=False)
    for each in result.warned:
        say(f"The optimizer said: {each}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "beside.png"
    result.draw(path)
    say(f"wrote {path}")
    if arguments.json is not None:
        write_json(arguments.json, result.as_json())
        say(f"wrote {arguments.json}")
    sys.stdout.flush()


def digits() -> Contest:
    """A perceptron on scikit-learn's 1797 handwritten digits, of which 397 are held out.

    Raises:
        UsageError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed: pip install 'metateleport[tasks]'"
        ) from None
    import torch
    from torch import nn

    from metateleport.evaluation.beside import Contest

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]

    def model() -> nn.Module:
        hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(128, 10))

    return Contest(
        model,
        (images[:1400], labels[:1400]),
        (images[1400:], labels[1400:]),
        "64-128-128-10 perceptron, 1400 handwritten digits, batches of 64",
    )


def _give(words: Sequence[str]) -> int:
    """Says a command, and runs it as if it had been given."""
    say("$ metateleport " + shlex.join(words))
    parser = Parser(prog="metateleport")
    commands = parser.add_subparsers(parser_class=Parser)
    train.add(commands)
    evaluate.add(commands)
    parsed = parser.parse_args(list(words))
    given = sys.argv
    # What a checkpoint and its runs record as their command is read from there.
    sys.argv = ["metateleport", *words]
    try:
        return int(parsed.run(parsed))
    finally:
        sys.argv = given
