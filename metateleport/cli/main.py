"""The command line: `metateleport train | evaluate | symmetries | experiment | tasks | ui`."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from metateleport.cli import combine, evaluate, experiment, reproduce, symmetries, train
from metateleport.cli.common import Parser, UsageError, positive, say
from metateleport.version import VERSION

__all__ = ["main"]

_EXAMPLES = """\
a way through:
  metateleport tasks                                  what there is to train on
  metateleport train digits --seconds 120             meta-train; writes runs/digits
  metateleport evaluate runs/digits digits            against tuned baselines, on tasks never trained on
  metateleport ui                                     compare the runs in a browser
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what stands behind the program's name; the process's own if not given.

    Returns:
        The exit code: 0, or 2 after bad input, which is told in one line, or 130 after Ctrl-C.
    """
    try:
        parsed = _parser().parse_args(arguments)
        return int(parsed.run(parsed))
    except KeyboardInterrupt as stopped:
        print(f"metateleport: {stopped}" if str(stopped) else "metateleport: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone; what is left to flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _bad_input() as error:
        print("metateleport: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def _bad_input() -> tuple[type[Exception], ...]:
    """Errors that are about what was asked for, and not about this program."""
    from metateleport.checkpoint import CheckpointError
    from metateleport.evaluation import EvaluationError
    from metateleport.families import FamilyError
    from metateleport.families.trial import StackError
    from metateleport.papers.experiments import ExperimentError
    from metateleport.symmetries import Unsuitable
    from metateleport.tracking import TrackingError
    from metateleport.training import TrainingError

    return (
        UsageError,
        FamilyError,
        StackError,
        CheckpointError,
        EvaluationError,
        ExperimentError,
        TrainingError,
        TrackingError,
        Unsuitable,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="metateleport",
        description="Learns to teleport: meta-learned moves along the symmetries of a network's loss.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"metateleport {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    train.add(commands)
    combine.add(commands)
    evaluate.add(commands)
    symmetries.add(commands)
    reproduce.add(commands)
    experiment.add(commands)
    tasks = commands.add_parser(
        "tasks",
        help="list the task families and their settings",
        description="Lists the task families that bare names stand for, with their settings and defaults.",
    )
    tasks.add_argument("--json", action="store_true", help="as JSON, for programs")
    tasks.set_defaults(run=_tasks)
    ui = commands.add_parser(
        "ui",
        help="open MLflow's pages on the runs made here",
        description="Serves MLflow's pages on the store that train and evaluate write to: mlflow.db in the working "
        "folder, or what MLFLOW_TRACKING_URI names.",
    )
    ui.add_argument("--host", default="127.0.0.1", help="address to serve at (default %(default)s)")
    ui.add_argument("--port", type=positive, default=5000, help="port to serve at (default %(default)s)")
    ui.set_defaults(run=_ui)
    return parser


def _tasks(arguments: argparse.Namespace) -> int:
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


def _ui(arguments: argparse.Namespace) -> int:
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
    say(f"MLflow's pages will be at http://{arguments.host}:{arguments.port} in about ten seconds; Ctrl-C ends them")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    sys.stdout.flush()
    return _become([*command, "--host", arguments.host, "--port", str(arguments.port)])


def _become(command: list[str]) -> NoReturn:
    os.execv(command[0], command)


if __name__ == "__main__":
    raise SystemExit(main())
