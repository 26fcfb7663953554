"""`metateleport train`: meta-trains a checkpoint by a recipe."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from metateleport.cli.common import Parser, UsageError, positive, say, settings_of
from metateleport.cli.progress import Lines, bars
from metateleport.interruption import Stopped

if TYPE_CHECKING:
    from metateleport.families import TaskFamily
    from metateleport.tracking import TrackedTraining
    from metateleport.training import Progression, Ranks, Recipe

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport train leaky_mlp --seconds 60 --out my_teleporter
  metateleport train tasks/digits.py --set rule.kind=adaptive outer.meta_steps=200
  metateleport train leaky_mlp --set family.width=12 family.distribution=normal --out runs/normal
  metateleport train matrix_factorisation --set gauge.kind=exact teleport=none --out runs/gauges
  metateleport train --recipe digits --meta-seeds 5 --out runs/digits     by the recipe of the shipped checkpoint
  metateleport train --recipe digits --set outer.teleport_cost=0.1        closes teleports that bring less than this
  metateleport train leaky_mlp --out runs/normal --resume                 after Ctrl-C, with the same settings
  metateleport train leaky_mlp --meta-seeds 5 --out runs/five             seeds 0 to 4 in one checkpoint
  torchrun --nproc-per-node 2 -m metateleport train leaky_mlp             two processes share the tasks; same result
  metateleport train leaky_mlp --set outer.estimator=pes outer.unroll=20 outer.horizon=1000    long horizons

A recipe has a table for each part: family, rule, teleport, gauge, outer and validation. Examples are
checkpoints/*/recipe.toml. --set PART.KEY=VALUE changes a setting. rule.kind is lr (a step for each tensor); coordinate,
tensor, adaptive, static or gauged (an update of every coordinate); or base (a hand-designed optimizer, rule.optimizer).
Another kind resets the part's other settings to the defaults. --set teleport=none or gauge=none leaves a part out;
--set teleport=default or gauge.kind=exact or gauge.kind=linearised adds one.

With a teleport or a gauge a second optimizer is trained by the same recipe without them, each for half of the time. It
is part of the same checkpoint, and 'evaluate' shows it as learned/step-only.
"""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "train",
        help="meta-train a checkpoint on a task family",
        description="Meta-trains a learned optimizer that teleports, by a recipe; writes a checkpoint.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "family",
        nargs="?",
        help="task family, trained by the default recipe: a bare name (see 'metateleport tasks') or the path of a file",
    )
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE", help="a recipe instead: name of a shipped checkpoint, or a TOML file"
    )
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="PART.KEY=VALUE", help="settings of the recipe"
    )
    parser.add_argument("--seconds", metavar="T", help="outer.seconds: stop after so many seconds, if sooner")
    parser.add_argument("--seed", metavar="S", help="outer.seed: seed of networks and tasks (default 0)")
    parser.add_argument("--device", help="outer.device: auto, cpu or cuda (default auto)")
    parser.add_argument(
        "--meta-seeds",
        type=positive,
        default=1,
        metavar="N",
        help="train from N seeds, S, S + 1, ..., into one checkpoint; --seconds is for each of them (default 1)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the checkpoint (default runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    parser.add_argument("--no-track", action="store_true", help="leave MLflow out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.families import load_family
    from metateleport.training import check_start, device_for, held, joined

    recipe, name = _recipe(arguments)
    device_for(recipe.outer.device)
    if not arguments.no_track:
        from metateleport.tracking import check_tracking

        check_tracking()
    family = load_family(recipe.family.name, recipe.family.settings)
    recipe = recipe.of_family(family)
    out = arguments.out or Path("runs") / (name or family.name)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, but a checkpoint is a folder: choose another --out")
    with joined(device_for(recipe.outer.device)) as ranks, held(out) if ranks.first else contextlib.nullcontext():
        # Before a run is opened, so that what cannot begin leaves none behind.
        ranks.from_first(
            lambda: check_start(recipe, out, arguments.resume, arguments.meta_seeds, restarted=bool(ranks.restarts))
        )
        _train(arguments, recipe, family, out, ranks)
    return 0


def _train(arguments: argparse.Namespace, recipe: Recipe, family: TaskFamily, out: Path, ranks: Ranks) -> None:
    """Trains; of several processes the first alone reports and is tracked."""
    from metateleport.training import Interrupted, tracking_run_of, train, train_meta_seeds

    command = "metateleport " + shlex.join(sys.argv[1:])
    # A training that goes on is one run in MLflow, however often it was interrupted.
    tracks = ranks.first and not arguments.no_track
    if ranks.restarts and ranks.first:
        say(f"all {ranks.size} processes were started anew (restart {ranks.restarts}): going on from the last state")
    begun = tracking_run_of(out) if tracks and (arguments.resume or ranks.restarts) else None
    with contextlib.ExitStack() as stack:
        tracked: TrackedTraining | None = None
        if tracks:
            from metateleport.tracking import Run, TrackedTraining

            tags = {"kind": "train", "family": family.name, "seed": recipe.outer.seed, "device": recipe.outer.device}
            opened = Run(family.name, out.name, recipe.flat(), {**tags, **_conditions()}, say, begun, system=True)
            tracked = TrackedTraining(stack.enter_context(opened), recipe.outer.teleport_cost)
        reporter = _Reporter(stack.enter_context(bars()), tracked, recipe) if ranks.first else None
        key = None if tracked is None else tracked.run.key
        try:
            if arguments.meta_seeds > 1:
                path = train_meta_seeds(
                    recipe, out, arguments.meta_seeds, arguments.resume, reporter, command, key, ranks
                )
            else:
                path = train(recipe, out, arguments.resume, reporter, command, key, ranks)
        except Interrupted as interrupted:
            raise Stopped(str(interrupted), interrupted.number) from None
        if tracked is not None:
            tracked.finish(path)
    if not ranks.first:
        return
    say(f"wrote the checkpoint {path}")
    if tracked is not None and tracked.run.id is not None:
        say(f"MLflow: run {tracked.run.id} in the experiment {family.name!r}; look at it with: metateleport ui")
    say(f"next: metateleport evaluate {shlex.quote(str(path))} {shlex.quote(recipe.family.name)}")


def _conditions() -> dict[str, str]:
    from metateleport.tracking.conditions import conditions

    return conditions()


def _recipe(arguments: argparse.Namespace) -> tuple[Recipe, str]:
    """The recipe and its name; the name is empty for a family's default recipe."""
    from metateleport.training import FamilySettings, Recipe, load_recipe
    from metateleport.training.recipe_file import recipe_name

    if (arguments.family is None) == (arguments.recipe is None):
        raise UsageError(
            "train takes either a task family or --recipe: a recipe has its family, which --set family.name=NAME "
            "replaces"
        )
    changes = settings_of(arguments.set)
    for flag in ("seconds", "seed", "device"):
        text, key = getattr(arguments, flag), f"outer.{flag}"
        if text is not None and key in changes:
            raise UsageError(f"--{flag} and --set {key} are the same setting: give one of them")
        if text is not None:
            changes[key] = text
    if arguments.family is not None and "family.name" in changes:
        raise UsageError(
            f"the task family {arguments.family} and --set family.name are the same setting: give one of them"
        )
    if arguments.recipe is not None:
        return load_recipe(arguments.recipe).changed(changes), recipe_name(arguments.recipe)
    if changes.get("outer.seconds", "none") != "none":
        # If only the time is given, the time ends the run.
        changes.setdefault("outer.meta_steps", "none")
    return Recipe(FamilySettings(arguments.family)).changed(changes), ""


class _Reporter:
    """Shows the progress of the training and tracks it with MLflow."""

    def __init__(self, bar: Progress | Lines, tracked: TrackedTraining | None, recipe: Recipe) -> None:
        self.bar, self.tracked, self.outer = bar, tracked, recipe.outer
        self.rows: dict[str, Any] = {}

    def __call__(self, name: str, progression: Progression, share: float) -> None:
        if name not in self.rows:
            self.rows[name] = self.bar.add_task(name, total=1.0, status="")
        loss = progression.meta_losses[-1] if progression.meta_losses else float("nan")
        speed = progression.meta_step / progression.seconds if progression.seconds > 0 else 0.0
        status = f"meta-step {progression.meta_step}, mean log loss {loss:.2f}, {speed:.1f} meta-steps/s"
        if not progression.meta_losses and progression.searched:
            status = f"search, round {len(progression.searched)} of {self.outer.search}"
            status += f", mean log loss {progression.searched[-1]:.2f}"
        if progression.skipped:
            status += f", {progression.skipped} skipped"
        opened = progression.openness[-1] if progression.openness else None
        if opened is not None and self.outer.teleport_cost:
            status += f", openness {opened:.2f}"
        self.bar.update(self.rows[name], completed=share, status=status)
        if self.tracked is not None:
            self.tracked(name, progression)
