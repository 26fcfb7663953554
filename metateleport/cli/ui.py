"""`metateleport ui`: serves MLflow's UI for the runs made here."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from metateleport.cli.common import Parser, UsageError, positive, say
from metateleport.cli.ports import free_port

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
    parser.add_argument("--port", type=positive, help="port to serve at (default: 5000, or a free one near it)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command until it is stopped."""
    from metateleport.tracking import check_tracking, synchronise, tracking_uri
    from metateleport.tracking.store import database_of

    check_tracking()
    uri = tracking_uri()
    database = database_of(uri)
    if database is not None and not database.exists():
        raise UsageError(
            f"there are no runs at {database}: run train or evaluate in this folder first, or set MLFLOW_TRACKING_URI"
        )
    # Runs whose process was killed would be shown as running.
    synchronise(say, uri)
    if uri.startswith(("http://", "https://")):
        say(f"the runs are kept by a server: open {uri}/{_VIEW}")
        return 0
    port = free_port(arguments.host, arguments.port, 5000)
    say(f"MLflow's UI will be at http://{arguments.host}:{port}/{_VIEW} in about ten seconds; Ctrl-C ends it")
    # One process is enough for one person, and none of those that run jobs for MLflow's traces is needed.
    os.environ.update(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    sys.stdout.flush()
    return _become([*command, "--host", arguments.host, "--port", str(port)])


_VIEW = "#/experiments?workflowType=machine_learning"
"""Opens the view of trainings; MLflow's own default is that of language models."""


def _become(command: list[str]) -> NoReturn:
    os.execv(command[0], command)
