"""`metateleport tasks`: lists the task families and their settings."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from metateleport.cli.common import Parser, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport tasks
  metateleport tasks --json | python -m json.tool        for programs
  metateleport train leaky_mlp --set family.width=12     a family's setting in a training
  metateleport evaluate none my_family.py                a file of your own in the place of a name
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "tasks",
        help="list the task families and their settings",
        description="Lists the task families that have a bare name, with their settings and defaults.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.families import FamilyError, gallery, load_family

    rows: list[dict[str, Any]] = []
    for name, path in gallery().items():
        try:
            family = load_family(path)
        except FamilyError as error:
            say(f"metateleport: {error}")
            continue
        settings = {key: "all" if value is None else value for key, value in family.settings().items()}
        summary = (inspect.getdoc(type(family)) or "").partition("\n")[0]
        rows.append({"name": name, "summary": summary, "settings": settings, "path": str(path)})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table("task family", "what it is", "settings and defaults", show_lines=True)
    for row in rows:
        table.add_row(
            row["name"], row["summary"], "\n".join(f"{key}={value}" for key, value in row["settings"].items())
        )
    Console().print(table)
    say("use a bare name, or the path of a file of your own, and --set name=value for settings")
    return 0
