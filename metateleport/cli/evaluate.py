"""`metateleport evaluate`: a checkpoint against tuned baselines on tasks it was never trained on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from metateleport.cli.common import Parser, UsageError, check_files, not_negative, positive, say, settings_of
from metateleport.cli.progress import status
from metateleport.files import FileError

if TYPE_CHECKING:
    from metateleport.evaluation import Bench, FairRules, Plan, Target

__all__ = ["add"]

# As in metateleport.evaluation.fair, which takes seconds to import.
MEASURES = ("end", "held-out", "target", "seconds")

_EXAMPLES = """\
examples:
  metateleport evaluate leaky_mlp leaky_mlp --json result.json --plot result.png
  metateleport evaluate leaky_mlp leaky_mlp --set width=100          a width it was never trained on
  metateleport evaluate leaky_mlp leaky_mlp --steps 1000 --methods learned     does it diverge far beyond its horizon?
  metateleport evaluate none digits --tasks 16 --methods adam,lbfgs  baselines alone
  metateleport evaluate none leaky_mlp --methods whitening,gauss-newton,soap   second-order references
  metateleport evaluate leaky_mlp_stays leaky_mlp --methods learned --without each    what parts of the basis bring
  metateleport evaluate digits digits --steps 300 --target adam@300  evaluations to the loss that tuned Adam has at 300
  metateleport evaluate lora lora_digits --steps 300 --rivals fair   rivals with equally many trials, and schedules
  metateleport evaluate digits digits --steps 300 --rivals fair --measure target --target adamw@300

Every method may spend --steps gradient evaluations on each task. A forward pass alone counts a third; everything that a
teleport or a line search evaluates is counted. All meta-seeds of a checkpoint are run, and the learned method's ratios
are over all of them. The baselines' step sizes are tuned on training tasks first. Sentences under the table say what
the learned teleport brings; the JSON has every comparison behind them in `attribution`.

Every finished trial and run is kept under ~/.cache/metateleport (or METATELEPORT_CACHE). After Ctrl-C the same command
goes on from there, with the same figures; the seconds of a run are those measured when it ran.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "evaluate",
        help="compare a checkpoint with tuned baselines on held-out tasks",
        description="Compares a checkpoint with tuned baselines on held-out tasks: table, JSON, plot and MLflow runs.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoint", help="folder or bare name of a checkpoint; 'none' for the baselines alone")
    parser.add_argument("task", help="task family: a bare name (see 'metateleport tasks') or the path of a file")
    parser.add_argument("--tasks", type=positive, default=64, metavar="N", help="held-out tasks (default %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=100, metavar="N", help="gradient evaluations a task (default %(default)s)"
    )
    parser.add_argument("--seed", type=not_negative, default=0, metavar="S", help="selects the tasks (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the task family")
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="only these methods, separated by commas (default: all but those that take long: gauss-newton, soap)",
    )
    parser.add_argument(
        "--meta-seeds",
        choices=("all", "best"),
        default="all",
        help="if the checkpoint has several: run all of them, or only the best one (default %(default)s)",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="also run the learned method without a generator of its basis, or several (A + B, all but A), or each",
    )
    parser.add_argument(
        "--target",
        metavar="METHOD@K",
        help="also compare how many evaluations each method needs to the loss that METHOD has at K, as adam@300",
    )
    parser.add_argument(
        "--rivals",
        choices=("library", "fair"),
        default="library",
        help="how rivals are tuned: each until the best of its grid lies inside, for the (held-out) loss at the end, "
        "without schedules; or with equally many trials for the measure that is claimed, and with schedules (default "
        "%(default)s)",
    )
    parser.add_argument(
        "--trials", type=positive, metavar="N", help="with --rivals fair: trials of each rival (default 12)"
    )
    parser.add_argument(
        "--measure",
        choices=MEASURES,
        help="with --rivals fair: what rivals are tuned for: the loss at the end (default), the held-out loss there, "
        "evaluations to the --target, or seconds to it",
    )
    parser.add_argument(
        "--trial-tasks", type=positive, metavar="N", help="with --rivals fair: training tasks of a trial (default 8)"
    )
    parser.add_argument(
        "--every",
        type=positive,
        default=1,
        metavar="N",
        help="measure the losses every N evaluations and at the marks, which is not counted but takes time (default 1)",
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="also give all other methods' losses over this one's, as adamw"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), help="dtype of the tasks (default: the family's)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="number of processes for the runs, with one thread each (default %(default)s); on several machines: "
        "torchrun ... -m metateleport evaluate",
    )
    parser.add_argument("--fresh", action="store_true", help="run and tune anew, ignoring results that are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot: png, svg or pdf")
    parser.add_argument(
        "--card", action="store_true", help="record the result in the checkpoint's card, with the command"
    )
    parser.add_argument("--no-track", action="store_true", help="leave MLflow out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint.card import CARD
    from metateleport.evaluation import (
        Bench,
        plot,
        record_result,
        report_of,
        run_plan,
        share_plan,
        target_of,
        write_report,
    )
    from metateleport.training import joined

    _check(arguments)
    bench = Bench(_plan(arguments))
    checkpoint = bench.checkpoint
    if arguments.card and checkpoint is None:
        raise UsageError("--card writes into a checkpoint's card, and 'none' is no checkpoint: name one")
    if arguments.card and checkpoint is not None:
        check_files(checkpoint.path / CARD)
    target = _target(arguments, bench.names)
    if arguments.against is not None and arguments.against not in bench.names:
        raise UsageError(f"--against {arguments.against}: that is none of the methods: {', '.join(bench.names)}")
    with joined(bench.plan.device) as ranks:
        if arguments.jobs > 1 and not ranks.alone:
            raise UsageError(f"--jobs {arguments.jobs} under torchrun, which has its own processes: leave it out")
        with status("starting") if ranks.first else contextlib.nullcontext() as doing:
            evaluation = run_plan(bench, arguments.jobs, doing) if ranks.alone else share_plan(bench, ranks, doing)
    if evaluation is None:
        return 0
    aimed = {} if target is None else {"target": target_of(evaluation, target)}
    command = "metateleport " + shlex.join(sys.argv[1:])
    report = {**report_of(evaluation, arguments.against), **aimed, "command": command}
    _show(report, bench)
    try:
        if arguments.json is not None:
            write_report(arguments.json, report)
            say(f"wrote {arguments.json}")
        if arguments.plot is not None:
            plot(report, arguments.plot)
            say(f"wrote {arguments.plot}")
        if arguments.card and checkpoint is not None:
            record_result(checkpoint.path, report, command)
            say(f"wrote the result into the card of {checkpoint.name}")
    except OSError as error:
        raise FileError(
            f"{error.filename or 'the result'} cannot be written ({error.strerror or error}): finished runs are kept, "
            "and the same command writes it once there is room"
        ) from error
    if not arguments.no_track:
        _track(report, None if checkpoint is None else checkpoint.card)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises a `UsageError` for arguments that cannot work, before any work starts."""
    if not arguments.no_track:
        from metateleport.tracking import check_tracking

        check_tracking()
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot writes png, svg or pdf, by the file's suffix; not {str(arguments.plot)!r}")
    check_files(arguments.json, arguments.plot)


def _plan(arguments: argparse.Namespace) -> Plan:
    from metateleport.evaluation import Plan
    from metateleport.training import device_for

    names = arguments.methods
    return Plan(
        task=arguments.task,
        settings=settings_of(arguments.set),
        checkpoint=arguments.checkpoint,
        methods=None if names is None else tuple(name.strip() for name in names.split(",") if name.strip()),
        without=tuple(arguments.without),
        tasks=arguments.tasks,
        steps=arguments.steps,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=str(device_for(arguments.device)),
        all_meta_seeds=arguments.meta_seeds == "all",
        fresh=arguments.fresh,
        every=arguments.every,
        rules=_rules(arguments),
    )


def _rules(arguments: argparse.Namespace) -> FairRules | None:
    from metateleport.evaluation import FairRules, Target

    given = {"trials": arguments.trials, "measure": arguments.measure, "tasks": arguments.trial_tasks}
    if arguments.rivals != "fair":
        flags = {"tasks": "--trial-tasks"}
        wrong = [flags.get(name, f"--{name}") for name, value in given.items() if value is not None]
        if wrong:
            raise UsageError(f"{' and '.join(wrong)}: that is a rule of --rivals fair, which is not given")
        return None
    rules = FairRules(**{name: value for name, value in given.items() if value is not None})
    if rules.aims == (arguments.target is None):
        raise UsageError(
            f"--measure {rules.measure} is for a target: give --target METHOD@K, as adamw@{arguments.steps}"
            if rules.aims
            else f"--target {arguments.target} needs rivals that are tuned for it: give --measure target (or seconds)"
        )
    if rules.aims:
        target = Target.parse(arguments.target)
        if target.at > arguments.steps:
            raise UsageError(f"the target {target} lies past the budget of {arguments.steps}: give at least that many")
    return dataclasses.replace(rules, target=arguments.target)


def _target(arguments: argparse.Namespace, names: Sequence[str]) -> Target | None:
    from metateleport.evaluation import Target
    from metateleport.evaluation.plan import FOR_THE_END

    if arguments.target is None:
        return None
    target = Target.parse(arguments.target)
    if arguments.rivals == "fair":
        target = Target(target.method + FOR_THE_END, target.at)
    target.check(names, arguments.steps)
    return target


def _show(report: dict[str, Any], bench: Bench) -> None:
    """Prints tables and sentences."""
    from metateleport.evaluation import ratios_table_of, table_of, words_of

    # A pipe has no width: a fixed one keeps the table from being wrapped.
    console = Console(width=None if Console().is_terminal else 160)
    for table in (table_of(report), ratios_table_of(report)):
        if table is not None:
            console.print(table)
    fair = "" if bench.plan.rules is None else f"Rivals under fair rules: {bench.plan.rules.words()}."
    for words in filter(None, [*words_of(report), report.get("target", {}).get("in_words"), fair]):
        Console(highlight=False, soft_wrap=True).print(words, markup=False)
    if report["kept"]:
        say(
            f"{len(report['kept'])} of {len(bench.units)} runs are from an earlier call, with the seconds measured "
            "then: --fresh makes them anew"
        )


def _track(report: dict[str, Any], card: dict[str, Any] | None) -> None:
    from metateleport.evaluation import plot, words_of, write_report
    from metateleport.tracking import track_evaluation

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "evaluation.json", Path(folder) / "evaluation.png"]
        write_report(files[0], report)
        plot(report, files[1])
        ids = track_evaluation(report, files, card, "\n\n".join(words_of(report)), say)
    if ids["evaluation"] is not None:
        say(
            f"MLflow: {len(ids)} runs in the experiment {report['task']['name']!r}, that of the evaluation is "
            f"{ids['evaluation']}; compare them with: metateleport compare {report['task']['name']}, or metateleport ui"
        )
