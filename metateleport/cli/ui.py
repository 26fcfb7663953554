"""`metateleport ui`: serves MLflow's UI for the runs made here."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from metateleport.cli.common import Parser, UsageError, positive, say

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport ui                                        the runs of this folder, at http://127.0.0.1:5000
  metateleport ui --port 5050
  MLFLOW_TRACKING_URI=sqlite:////home/me/mlflow.db metateleport ui
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "ui",
        help="serve MLflow's UI for the runs made here",
        description="Serves MLflow's UI for the store that train and evaluate write to: mlflow.db in the working "
        "folder, or the store that MLFLOW_TRACKING_URI names.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default %(default)s)")
    parser.add_argument("--port", type=positive, default=5000, help="port to serve at (default %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.tracking.runs import database_of, require_mlflow, tracking_uri

    require_mlflow()
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        say(f"the runs are kept by a server: open {uri}")
        return 0
    database = database_of(uri)
    if database is not None and not database.exists():
        raise UsageError(
            f"there are no runs at {database}: run train or evaluate in this folder first, or set MLFLOW_TRACKING_URI"
        )
    say(f"MLflow's UI will be at http://{arguments.host}:{arguments.port} in about ten seconds; Ctrl-C ends it")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    sys.stdout.flush()
    return _become([*command, "--host", arguments.host, "--port", str(arguments.port)])


def _become(command: list[str]) -> NoReturn:
    os.execv(command[0], command)
