"""`metateleport checkpoints`: the checkpoints that bare names stand for, and the models that each serves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from metateleport.cli.common import Parser, say

__all__ = ["add", "serves"]

_EXAMPLES = """\
examples:
  metateleport checkpoints                 the shipped ones and those of METATELEPORT_CHECKPOINTS
  metateleport checkpoints --json          the same for a program
"""

_MODELS = {
    "GL": "linear layers in a row, LoRA, attention",
    "diagonal": "layers with ReLU or LeakyReLU between",
    "O": "quadratics",
}


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "checkpoints",
        help="list the checkpoints, and for which models each is",
        description="Lists the checkpoints that are known by a bare name, and for which models each is.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint import CheckpointError, read_card, shipped_checkpoints

    rows = []
    for name, path in sorted(shipped_checkpoints().items()):
        try:
            rows.append({"name": name, **serves(read_card(path)), "path": str(path)})
        except CheckpointError as error:
            say(f"{name} is left out: {error}")
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(box=box.SIMPLE)
    for title in ("checkpoint", "learns", "for which models", "steps see"):
        table.add_column(title)
    for row in rows:
        table.add_row(row["name"], row["learns"], row["models"], row["data"])
    Console(width=None if Console().is_terminal else 160).print(table)
    say("use one with mt.LearnedOptimizer(model, NAME) or mt.load(NAME); more on each: metateleport show NAME")
    return 0


def serves(card: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint learns, and for which models and data it is, in words.

    Example:
        >>> shape = {"rule": {"kind": "lr"}, "teleport": {}, "groups": ["GL"]}
        >>> serves({"meta_optimizer": shape, "made_for": {"groups": ["GL"], "minibatches": False}})["models"]
        'linear layers in a row, LoRA, attention'
    """
    shape = card.get("meta_optimizer") or {}
    made_for = card.get("made_for") if isinstance(card.get("made_for"), Mapping) else {}
    assert isinstance(made_for, Mapping)
    learns = [f"steps ({shape.get('rule', {}).get('kind', '?')})"] if card.get("mode") != "tele" else []
    learns += [word for key, word in (("teleport", "teleports"), ("gauge", "gauges")) if key in shape]
    groups = made_for.get("groups") or ()
    models = "; ".join(_MODELS.get(group, group) for group in groups) or "any model"
    if not groups and ("teleport" in shape or "gauge" in shape):
        along = "; ".join(_MODELS.get(group, group) for group in shape.get("groups", ()))
        models += f", teleports along {along}" if along else ""
    data = "minibatches" if made_for.get("minibatches", True) else "all data at once"
    if made_for.get("losses"):
        data += f", {made_for['losses']}"
    return {"learns": ", ".join(learns), "models": models, "data": data}
