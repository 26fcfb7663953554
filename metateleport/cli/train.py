"""`metateleport train`: meta-trains a checkpoint on a task family."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from metateleport.cli.common import Parser, UsageError, not_negative, positive, say, settings_of

if TYPE_CHECKING:
    from metateleport.tracking import Run
    from metateleport.training import Progression, TrainConfig

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport train leaky_mlp --seconds 60 --out my_teleporter
  metateleport train tasks/digits.py --mode update+tele --meta-steps 200
  metateleport train leaky_mlp --set width=12 --set distribution=normal --out runs/normal
  metateleport train matrix_factorisation --gauge exact --no-stays --out runs/gauges
  metateleport train digits --teleport-cost 0.1 --out runs/priced    a teleport that brings less than that closes
  metateleport train leaky_mlp --out runs/normal --resume            after Ctrl-C, with the same settings
  metateleport train leaky_mlp --meta-seeds 5 --out runs/five        seeds 0 to 4; the best of them on top

In a mode with '+tele' a second optimizer is trained by the same recipe without teleports, half of the time each: it
ships in the same checkpoint, and 'evaluate' shows it as learned/step-only.
"""

_UNBOUNDED = 10**6


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    from metateleport.learned.meta_optimizer import GAUGES, MODES, UPDATES

    parser: Parser = commands.add_parser(
        "train",
        help="meta-train a checkpoint on a task family",
        description="Meta-trains a learned optimizer that teleports, on tasks of one family; writes a checkpoint.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("task", help="task family: a bare name (see 'metateleport tasks') or the path of a file")
    parser.add_argument("--mode", choices=MODES, default="lr+tele", help="what is learned (default %(default)s)")
    parser.add_argument("--network", choices=("equivariant", "flat"), default="equivariant", help="flat: the paper's")
    parser.add_argument(
        "--stays",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="learn a teleport that stays: the model moves along its orbit (default: yes)",
    )
    parser.add_argument("--gauge", choices=GAUGES, default="none", help="learn a gauge for each tensor, undone again")
    parser.add_argument(
        "--metric-memory",
        type=float,
        metavar="X",
        help="share of a gauge's metric that is kept from one minibatch to the next (default 0.95)",
    )
    parser.add_argument("--update", choices=UPDATES, help="modes with 'update': its size (default coordinate)")
    parser.add_argument("--secants", type=not_negative, metavar="N", help="secant pairs around the learned step")
    parser.add_argument(
        "--teleport-cost",
        type=float,
        metavar="X",
        help="price on teleports and gauges: one that is wide open has to lower the mean log loss by X (default 0)",
    )
    parser.add_argument(
        "--max-stretch",
        type=float,
        metavar="X",
        help="all teleports that stay may together stretch or shrink anything by this factor (default: no bound)",
    )
    parser.add_argument(
        "--cooling",
        type=float,
        metavar="A",
        help="shorten steps at the noise floor by 1 / (1 + A r), r the evaluations there, A learned on; with --update "
        "adaptive by 1 / sqrt(1 + A t), t all evaluations (default 0)",
    )
    parser.add_argument(
        "--blind",
        type=float,
        metavar="SHARE",
        help="hide the losses from the networks in this share of the windows (default 0.5)",
    )
    parser.add_argument("--longest", type=float, metavar="X", help="longest step over the joint bound (default 1.5)")
    parser.add_argument("--meta-steps", type=positive, metavar="N", help="updates of the networks")
    parser.add_argument("--seconds", type=float, metavar="T", help="stop after so many seconds, if sooner")
    parser.add_argument("--tasks", type=positive, metavar="N", help="tasks stacked in one graph")
    parser.add_argument("--unroll", type=positive, metavar="N", help="inner steps that one meta-step goes through")
    parser.add_argument("--horizon", type=positive, metavar="N", help="inner steps at the end of the curriculum")
    parser.add_argument("--validation-every", type=positive, metavar="N", help="meta-steps between validations")
    parser.add_argument(
        "--search", type=not_negative, metavar="N", help="first N rounds of evolution on the networks' constants"
    )
    parser.add_argument("--starts", type=positive, metavar="N", help="initialisations tried; the best goes on")
    parser.add_argument("--start-from", metavar="CHECKPOINT", help="start from its networks, of the same meta-seed")
    parser.add_argument("--lr", type=float, metavar="X", help="step size of the meta-training")
    parser.add_argument("--hidden", type=positive, metavar="N", help="units of the LSTMs")
    parser.add_argument("--base", metavar="NAME", help="mode tele: the optimizer that takes the steps")
    parser.add_argument("--base-lr", type=float, metavar="X", help="mode tele: its step size")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the task family")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the checkpoint (default runs/TASK)")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="S", help="of networks and tasks (default 0)")
    parser.add_argument(
        "--meta-seeds",
        type=positive,
        default=1,
        metavar="N",
        help="train from N seeds, S and on, one after another, into one checkpoint; --seconds is for each (default 1)",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of the tasks (default: the family's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    parser.add_argument("--no-track", action="store_true", help="leave MLflow out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.families import load_family
    from metateleport.training import Interrupted, TrainConfig, device_for, train, train_meta_seeds

    device_for(arguments.device)
    if not arguments.no_track:
        from metateleport.tracking import require_mlflow

        require_mlflow()
    settings = settings_of(arguments.set)
    family = load_family(arguments.task, settings)
    out = arguments.out or Path("runs") / family.name
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and a checkpoint is a folder: choose another --out")
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(arguments, field.name, None) is not None
    }
    if arguments.seconds is not None:
        # Where only the time is given, it is the time that ends the run.
        given.setdefault("meta_steps", _UNBOUNDED)
    config = TrainConfig(**{**given, "family": arguments.task, "settings": family.settings()})
    command = "metateleport " + shlex.join(sys.argv[1:])
    with contextlib.ExitStack() as stack:
        tracked: Run | None = None
        if not arguments.no_track:
            from metateleport.tracking import Run

            parameters = {**dataclasses.asdict(config), **{f"task.{k}": v for k, v in config.settings.items()}}
            del parameters["settings"]
            tracked = stack.enter_context(Run(f"train/{family.name}", out.name, parameters, {"command": command}, say))
        bar = stack.enter_context(_bar())
        try:
            reporter = _Reporter(bar, tracked, config)
            if arguments.meta_seeds > 1:
                path = train_meta_seeds(config, out, arguments.meta_seeds, arguments.resume, reporter, command)
            else:
                path = train(config, out, arguments.resume, reporter, command)
        except Interrupted as interrupted:
            raise KeyboardInterrupt(str(interrupted)) from None
        if tracked is not None:
            tracked.artifact(path)
    say(f"wrote the checkpoint {path}")
    if tracked is not None:
        say(f"MLflow: run {tracked.id} in the experiment {tracked.experiment!r}; look at it with: metateleport ui")
    say(f"next: metateleport evaluate {shlex.quote(str(path))} {shlex.quote(arguments.task)}")
    return 0


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


class _Reporter:
    """Shows how the training is getting on, and tracks it."""

    def __init__(self, bar: Progress, tracked: Run | None, config: TrainConfig) -> None:
        self.bar, self.tracked, self.config = bar, tracked, config
        self.rows: dict[str, Any] = {}
        self.validated: dict[str, int] = {}

    def __call__(self, name: str, progression: Progression, share: float) -> None:
        if name not in self.rows:
            self.rows[name] = self.bar.add_task(name, total=1.0, status="")
        loss = progression.meta_losses[-1] if progression.meta_losses else float("nan")
        speed = progression.meta_step / progression.seconds if progression.seconds > 0 else 0.0
        status = f"meta-step {progression.meta_step}, mean log loss {loss:.2f}, {speed:.1f} meta-steps/s"
        if not progression.meta_losses and progression.searched:
            status = f"search, round {len(progression.searched)} of {self.config.search}"
            status += f", mean log loss {progression.searched[-1]:.2f}"
        if progression.skipped:
            status += f", {progression.skipped} skipped"
        opened = progression.openness[-1] if progression.openness else None
        if opened is not None and self.config.teleport_cost:
            status += f", openness {opened:.2f}"
        self.bar.update(self.rows[name], completed=share, status=status)
        if self.tracked is None:
            return
        for step, score in progression.validations[self.validated.get(name, 0) :]:
            self.tracked.log({f"{name}/validation": score}, step=int(step))
        self.validated[name] = len(progression.validations)
        if not progression.meta_losses and progression.searched:
            self.tracked.log({f"{name}/search": progression.searched[-1]}, step=len(progression.searched))
            return
        metrics = {f"{name}/meta_loss": loss, f"{name}/skipped": progression.skipped, f"{name}/speed": speed}
        if opened is not None:
            metrics[f"{name}/openness"] = opened
            metrics[f"{name}/teleport_price"] = self.config.teleport_cost * opened
        self.tracked.log(metrics, step=progression.meta_step)
