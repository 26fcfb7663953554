"""`metateleport evaluate`: a checkpoint against tuned baselines on tasks it was never trained on."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from metateleport.cli.common import Parser, UsageError, not_negative, positive, say, settings_of

if TYPE_CHECKING:
    import torch

    from metateleport.checkpoint import Checkpoint
    from metateleport.evaluation import Method, Seed, Target
    from metateleport.families import TaskFamily

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport evaluate leaky_mlp leaky_mlp --json result.json --plot result.png
  metateleport evaluate leaky_mlp leaky_mlp --set width=100          a width it was never trained on
  metateleport evaluate leaky_mlp leaky_mlp --steps 1000 --methods learned     does it diverge far beyond its horizon?
  metateleport evaluate none digits --tasks 16 --methods adam,lbfgs  baselines alone
  metateleport evaluate none leaky_mlp --methods whitening,gauss-newton,soap   second-order references
  metateleport evaluate leaky_mlp_stays leaky_mlp --methods learned --without each    what parts of the basis bring
  metateleport evaluate digits digits --steps 300 --target adam@300  evaluations to the loss that tuned Adam has at 300

Every method may spend --steps gradient evaluations on each task; a forward pass alone counts a third, and whatever a
teleport or a line search evaluates is counted. Of a checkpoint of several meta-seeds all are run, and what is said
of the learned one is said over all of them. The baselines' step sizes are tuned on training tasks first, which is
remembered under ~/.cache/metateleport (or METATELEPORT_CACHE). What the learned teleport brings stands in words under
the table, and with every comparison behind it in the JSON's `attribution`.
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
    parser.add_argument("--seed", type=not_negative, default=0, metavar="S", help="chooses the tasks (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the task family")
    parser.add_argument(
        "--methods", metavar="A,B", help="only these methods, separated by commas (default: all but gauss-newton, soap)"
    )
    parser.add_argument(
        "--meta-seeds",
        choices=("all", "best"),
        default="all",
        help="of a checkpoint of several: run the learned methods of all, or of the best alone (default %(default)s)",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="also run the learned one without an element of its basis, or without several (A + B, all but A), or each",
    )
    parser.add_argument(
        "--target",
        metavar="METHOD@K",
        help="also compare what each method needs to the loss that METHOD has at K, as adam@300",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of the tasks (default: the family's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot: png, svg or pdf")
    parser.add_argument(
        "--card", action="store_true", help="write the medians into the checkpoint's card, beside the command"
    )
    parser.add_argument("--no-track", action="store_true", help="leave MLflow out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    import torch

    from metateleport.evaluation import (
        evaluate,
        plot,
        ratios_table_of,
        record_result,
        report_of,
        table_of,
        target_of,
        words_of,
        write_report,
    )
    from metateleport.families import load_family
    from metateleport.training import device_for

    if not arguments.no_track:
        from metateleport.tracking import require_mlflow

        require_mlflow()
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot writes png, svg or pdf, by the file's suffix; not {str(arguments.plot)!r}")
    for path in (arguments.json, arguments.plot):
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder: give the name of a file to write")
    device = device_for(arguments.device)
    family = load_family(arguments.task, settings_of(arguments.set))
    checkpoint = _checkpoint(arguments.checkpoint)
    if arguments.card and checkpoint is None:
        raise UsageError("--card writes into a checkpoint's card, and 'none' has none: name a checkpoint")
    learned, baselines = _chosen(arguments.methods, arguments.without, checkpoint, arguments.seed)
    target = _target(arguments, [*(method.name for method in learned), *baselines])
    seeds = _seeds(checkpoint, learned, arguments.seed) if arguments.meta_seeds == "all" else []
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    with Console(stderr=True).status("starting") as status:
        methods = [*learned, *_tuned(baselines, family, arguments.steps, dtype, device, status.update)]
        evaluation = evaluate(
            family,
            methods,
            arguments.tasks,
            arguments.steps,
            arguments.seed,
            dtype,
            device,
            "none" if checkpoint is None else checkpoint.name,
            progress=lambda name: status.update(f"running {name} on {arguments.tasks} held-out tasks"),
            meta_seeds=seeds,
        )
    report = {**report_of(evaluation), **({} if target is None else {"target": target_of(evaluation, target)})}
    for table in (table_of(report), ratios_table_of(report)):
        if table is not None:
            _print(table)
    for words in filter(None, [*words_of(report), report.get("target", {}).get("in_words")]):
        Console(highlight=False, soft_wrap=True).print(words, markup=False)
    if arguments.json is not None:
        write_report(arguments.json, report)
        say(f"wrote {arguments.json}")
    if arguments.plot is not None:
        plot(report, arguments.plot)
        say(f"wrote {arguments.plot}")
    if arguments.card and checkpoint is not None:
        record_result(checkpoint.path, report, "metateleport " + shlex.join(sys.argv[1:]))
        say(f"wrote the result into the card of {checkpoint.name}")
    if not arguments.no_track:
        _track(report, None if checkpoint is None else checkpoint.path)
    return 0


def _target(arguments: argparse.Namespace, names: Sequence[str]) -> Target | None:
    from metateleport.evaluation import Target

    if arguments.target is None:
        return None
    target = Target.parse(arguments.target)
    target.check(names, arguments.steps)
    return target


def _checkpoint(name: str) -> Checkpoint | None:
    from metateleport.checkpoint import load_checkpoint

    return None if name == "none" else load_checkpoint(name)


def _chosen(
    names: str | None, without: Sequence[str], checkpoint: Checkpoint | None, seed: int
) -> tuple[Sequence[Method], list[str]]:
    """The learned methods and the names of the baselines that were asked for; all of both if none were."""
    from metateleport.evaluation import BASELINES, REFERENCES
    from metateleport.evaluation.methods.learned import learned_methods

    learned = [] if checkpoint is None else learned_methods(checkpoint, seed=seed)
    usual = [*(method.name for method in learned), *BASELINES]
    known = [*usual, *REFERENCES]
    wanted = usual if names is None else [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            where = "without a checkpoint" if checkpoint is None else f"for {checkpoint.name} (mode {checkpoint.mode})"
            raise UsageError(f"there is no method {name!r} {where}: there are {', '.join(known)}")
    if "soap" in wanted and importlib.util.find_spec("pytorch_optimizer") is None:
        raise UsageError("soap needs pytorch_optimizer: pip install 'metateleport[second-order]'")
    if not wanted:
        raise UsageError(f"--methods names none: there are {', '.join(known)}")
    chosen = [method for method in learned if method.name in wanted]
    return [*chosen, *_ablated(without, checkpoint, chosen)], [
        name for name in (*BASELINES, *REFERENCES) if name in wanted
    ]


def _ablated(asked: Sequence[str], checkpoint: Checkpoint | None, learned: Sequence[Method]) -> Sequence[Method]:
    """The learned optimizer without each part of its basis that was asked for."""
    from metateleport.evaluation import ablated_methods, parts_of

    if not asked:
        return []
    if checkpoint is None:
        raise UsageError("--without leaves out a part of a checkpoint's basis, and 'none' has none: name a checkpoint")
    if "learned" not in [method.name for method in learned]:
        raise UsageError("what --without leaves out is compared with the learned optimizer: add learned to --methods")
    return ablated_methods(checkpoint, parts_of(asked, checkpoint.learned))


def _seeds(checkpoint: Checkpoint | None, learned: Sequence[Method], seed: int) -> list[Seed]:
    """The same learned methods of every meta-seed of a checkpoint; none for the chosen one, which is run anyway."""
    from metateleport.checkpoint.seeds import each_meta_seed
    from metateleport.evaluation import ABLATED, Seed, ablated_methods
    from metateleport.evaluation.methods.learned import learned_methods

    if checkpoint is None or not checkpoint.meta_seeds or not learned:
        return []
    names = [method.name for method in learned]
    parts = {
        method.name.removeprefix(ABLATED): method.settings["without"]
        for method in learned
        if method.name.startswith(ABLATED)
    }

    def methods(each: Checkpoint) -> list[Method]:
        return [*learned_methods(each, names, seed), *ablated_methods(each, parts)]

    return [
        Seed(known.seed, known.validation, () if each is checkpoint else methods(each))
        for known, each in zip(checkpoint.meta_seeds, each_meta_seed(checkpoint), strict=True)
    ]


def _tuned(
    names: Sequence[str],
    family: TaskFamily,
    steps: int,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: Any,
) -> list[Method]:
    from metateleport.evaluation import BASELINES, REFERENCES, tune

    recipes = {**BASELINES, **REFERENCES}
    methods = []
    for name in names:
        progress(f"tuning {name} on training tasks (remembered for the next time)")
        methods.append(tune(recipes[name], family, steps, dtype, device))
    return methods


def _track(report: dict[str, Any], checkpoint: Path | None) -> None:
    from metateleport.evaluation import plot, write_report
    from metateleport.tracking import track_evaluation

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "evaluation.json", Path(folder) / "evaluation.png"]
        write_report(files[0], report)
        plot(report, files[1])
        ids = track_evaluation(report, files, checkpoint, say)
    say(
        f"MLflow: {len(ids)} runs in the experiment {report['task']['name']!r}"
        + (f", the learned one is {ids['learned']}" if "learned" in ids else "")
        + "; compare them with: metateleport ui"
    )


def _print(table: Any) -> None:
    console = Console()
    # A pipe has no width of its own: the table is not to be folded there.
    Console(width=None if console.is_terminal else 160).print(table)
