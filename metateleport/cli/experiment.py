"""`metateleport experiment`: tests of the papers' claims about teleportation, one command for each experiment."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from metateleport.cli.common import Parser, UsageError, check_files, not_negative, say, settings_of
from metateleport.cli.progress import status
from metateleport.files import write_text

if TYPE_CHECKING:
    from metateleport.papers.experiments import Claim, Experiment, ExperimentResult

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport experiment                                             lists experiments, settings and defaults
  metateleport experiment quadratic --json quadratic.json --png quadratic.png
  metateleport experiment newton --seed 3 --set functions=50 --no-track

The table and the JSON's `claims` say for each claim of the papers whether it holds in this run: yes, no, or not
decided. In the JSON, `holds` is true, false or null (not decided), and `interval` is null if the value is not an
estimate. Nothing else is null, and no number is infinite or NaN.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "experiment",
        help="test claims about teleportation",
        description="Runs an experiment that tests claims about teleportation: claims, JSON, figure and an MLflow run.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; without one, all are listed")
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="S", help="seed of all random numbers (default 0)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the experiment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, results and claims as JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the figure")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table of claims as Markdown")
    parser.add_argument("--no-track", action="store_true", help="leave MLflow out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.papers.experiments import load_experiment

    if arguments.name is None:
        return _list(arguments)
    if arguments.png is not None and arguments.png.suffix != ".png":
        raise UsageError(f"--png writes a file that ends in .png; not {str(arguments.png)!r}")
    check_files(arguments.json, arguments.png, arguments.page)
    experiment = load_experiment(arguments.name, settings_of(arguments.set))
    if not arguments.no_track:
        from metateleport.tracking import check_tracking

        check_tracking()
    with status(f"{experiment.name}: starting") as show:
        result = experiment.run(arguments.seed, lambda doing: show(f"{experiment.name}: {doing}"))
    _print(result)
    if arguments.json is not None:
        result.write(arguments.json)
        say(f"wrote {arguments.json}")
    if arguments.png is not None:
        experiment.plot(result, arguments.png)
        say(f"wrote {arguments.png}")
    if arguments.page is not None:
        write_text(arguments.page, _page(experiment, result))
        say(f"wrote {arguments.page}")
    if not arguments.no_track:
        _track(experiment, result)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from metateleport.papers.experiments import EXPERIMENTS, summary_of

    if arguments.set or arguments.json or arguments.png or arguments.page:
        raise UsageError(f"which experiment is meant? There are {', '.join(EXPERIMENTS)}")
    table = Table("experiment", "what it tests", "settings and defaults", show_lines=True)
    for name, kind in EXPERIMENTS.items():
        settings = vars(kind())
        table.add_row(name, summary_of(kind), "\n".join(f"{key}={value}" for key, value in settings.items()))
    _show(table)
    return 0


def _print(result: ExperimentResult) -> None:
    table = Table("claim", "source", "value", "holds", title=f"{result.experiment}, {result.seconds:.0f} s")
    for claim in result.claims:
        table.add_row(claim.claim, claim.source, _value(claim), _holds(claim))
    _show(table)


def _page(experiment: Experiment, result: ExperimentResult) -> str:
    from metateleport.evaluation.pages.markdown import table

    usual = vars(type(experiment)())
    own = [f" --set {name}={value}" for name, value in result.settings.items() if value != usual.get(name, value)]
    lines = [
        f"# Claims tested by `{result.experiment}`",
        "",
        "This command writes the page. A value that is an estimate has its 95 % interval beside it.",
        "",
        "```",
        f"metateleport experiment {result.experiment} --seed {result.settings['seed']}{''.join(own)} --page FILE",
        "```",
        "",
    ]
    rows = [[claim.claim, claim.source, _value(claim), _holds(claim)] for claim in result.claims]
    return "\n".join([*lines, *table(["claim", "source", "value", "holds"], rows)])


def _value(claim: Claim) -> str:
    if claim.interval is None:
        return f"{claim.value:.3g}"
    return f"{claim.value:.3g} [{claim.interval[0]:.3g}, {claim.interval[1]:.3g}]"


def _holds(claim: Claim) -> str:
    return {True: "yes", False: "no", None: "not decided"}[claim.holds]


def _show(table: Table) -> None:
    console = Console()
    # A pipe has no width: a fixed one keeps the table from being wrapped.
    Console(width=None if console.is_terminal else 160).print(table)


def _track(experiment: Experiment, result: ExperimentResult) -> None:
    from metateleport.tracking import Run

    parameters = result.as_json()["settings"]
    # MLflow's metrics are numbers; the claims' texts are tags with the same number in their name.
    numbered = {f"claim_{place:02d}": claim for place, claim in enumerate(result.claims, 1)}
    tags = {"experiment": result.experiment}
    for name, claim in numbered.items():
        tags[name] = json.dumps(claim.as_json(), ensure_ascii=False)[:5000]
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(
            f"experiment {result.experiment}", f"{result.experiment} seed {parameters['seed']}", parameters, tags, say
        ) as run,
    ):
        run.log({"seconds": result.seconds, **{name: claim.value for name, claim in numbered.items()}})
        decided = {name: claim for name, claim in numbered.items() if claim.holds is not None}
        run.log({f"{name}_holds": float(bool(claim.holds)) for name, claim in decided.items()})
        files = [Path(folder) / f"{result.experiment}.json", Path(folder) / f"{result.experiment}.png"]
        result.write(files[0])
        experiment.plot(result, files[1])
        for path in files:
            run.artifact(path)
    if run.id is not None:
        say(
            f"MLflow: run {run.id} in the experiment {'experiment ' + result.experiment!r}; see it with: metateleport "
            "ui"
        )
