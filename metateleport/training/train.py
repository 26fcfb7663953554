"""A whole meta-training: the networks, those of the step alone for attribution, and the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metateleport.checkpoint import save_checkpoint
from metateleport.families import TaskFamily, load_family
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.progression import Progression
from metateleport.training.recipe import Recipe, TrainingError, device_for
from metateleport.training.state import TrainingState, first_difference, read_state, resume_folder, write_state
from metateleport.training.trainer import MetaTrainer
from metateleport.training.warm_start import warm_start, warm_start_checkpoint

__all__ = ["Interrupted", "train"]

_LEARNED, _STEP_ONLY = "learned", "step-only"
_LOOKED_AT = 32


class Interrupted(Exception):
    """The training was interrupted and its state is saved; the message says where."""


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    report: Callable[[str, Progression, float], None] | None = None,
    command: str = "",
    tracking_run: str | None = None,
) -> Path:
    """Meta-trains and writes a checkpoint.

    In a mode with a teleport or a gauge a second meta-optimizer is trained by the same recipe without them, each for
    half of the time. It is part of the checkpoint and the method `learned/step-only` of an evaluation's attribution.

    Args:
        recipe: the recipe.
        out: folder of the checkpoint.
        resume: go on with an interrupted training; the recipe has to be the same.
        report: called after every meta-step with the network's name, its progression and the share that is done.
        command: the command that started this training, for the card.
        tracking_run: id of the MLflow run that it is tracked in. It is kept with the state and on the card; resumed
            without one, the training keeps the one that it has.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: if settings cannot work, there is nothing to resume, or it was started with other settings.
        FamilyError: if the task family cannot be loaded.
        Interrupted: after Ctrl-C, once the state is saved.
    """
    device_for(recipe.outer.device)
    family = load_family(recipe.family.name, recipe.family.settings)
    recipe = recipe.of_family(family)
    trainers = _trainers(recipe, family)
    saved = resume_folder(out)
    if resume:
        kept = _restore(saved, recipe, trainers).tracking_run
        tracking_run = tracking_run or kept
    elif saved.exists():
        raise TrainingError(f"{saved} holds an unfinished training: add --resume to go on with it, or remove it")

    def save() -> None:
        write_state(saved, _state(recipe, trainers, tracking_run))

    try:
        for name, trainer in trainers.items():
            trainer.run(_reporting(name, trainer, report, save))
    except KeyboardInterrupt:
        save()
        raise Interrupted(f"interrupted; the state is in {saved}, and the same command with --resume goes on") from None
    learned = trainers[_LEARNED].best_meta()
    step_only = trainers[_STEP_ONLY].best_meta() if _STEP_ONLY in trainers else None
    path = save_checkpoint(
        out, learned, step_only, _card(Path(out).name, recipe, family, trainers, command, tracking_run)
    )
    shutil.rmtree(saved, ignore_errors=True)
    return path


def _trainers(recipe: Recipe, family: TaskFamily) -> dict[str, MetaTrainer]:
    outer = recipe.outer
    # A first stack, so that tasks that cannot be evaluated are reported before any work.
    family.stack([0], "train", outer.seed, outer.torch_dtype)
    groups = _groups(family, recipe)
    if not groups and (recipe.teleport or recipe.gauge):
        raise TrainingError(
            f"{recipe.family.name} names no symmetries with these settings: leave teleport and gauge out of the recipe "
            "(--set teleport=none)"
        )
    shape = recipe.networks(groups)
    wanted = {_LEARNED: shape}
    if shape.teleports and shape.steps:
        wanted[_STEP_ONLY] = shape.without_teleport()
    seconds = None if outer.seconds is None else outer.seconds / len(wanted)
    trainers = {}
    source = None if outer.start_from is None else warm_start_checkpoint(outer.start_from, outer.seed)
    for name, each in wanted.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(outer.seed)
            meta = MetaOptimizer(each)
        if source is not None:
            warm_start(meta, source, step_only=name == _STEP_ONLY)
        trainers[name] = MetaTrainer(recipe, family, meta, seconds)
    return trainers


def _groups(family: TaskFamily, recipe: Recipe) -> tuple[str, ...]:
    """Names of the groups of the tasks' symmetries, over all settings that the training varies."""
    outer = recipe.outer
    families = [family, *(family.augmented(number, outer.seed) for number in range(_LOOKED_AT))]
    tasks = [each.task(0, "train", outer.seed, outer.torch_dtype) for each in dict.fromkeys(families)]
    return tuple(dict.fromkeys(symmetry.group.name for task in tasks for symmetry in task.symmetries))


def _reporting(
    name: str,
    trainer: MetaTrainer,
    report: Callable[[str, Progression, float], None] | None,
    save: Callable[[], None],
) -> Callable[[Progression], None]:
    def reported(progression: Progression) -> None:
        if progression.meta_step % trainer.recipe.validation.every == 0:
            save()
        if report is not None:
            report(name, progression, trainer.share_of_all)

    return reported


def _state(recipe: Recipe, trainers: dict[str, MetaTrainer], tracking_run: str | None) -> TrainingState:
    return TrainingState(recipe, {name: trainer.boundary for name, trainer in trainers.items()}, tracking_run)


def _restore(folder: Path, recipe: Recipe, trainers: dict[str, MetaTrainer]) -> TrainingState:
    state = read_state(folder)
    if state is None:
        raise TrainingError(f"there is nothing to resume: {folder} does not exist. Start without --resume")
    changed = first_difference(state.recipe, recipe)
    if changed is not None:
        raise TrainingError(
            f"the training in {folder} was started with {changed}: resume with the same settings, or remove the folder "
            "and start anew"
        )
    for name, trainer in trainers.items():
        try:
            trainer.restore(state.snapshots[name])
        except (KeyError, TypeError, RuntimeError) as error:
            raise TrainingError(
                f"the state of {name} in {folder} is damaged or of another version ({error}): remove {folder} and "
                "start anew"
            ) from error
    return state


def _card(
    name: str,
    recipe: Recipe,
    family: TaskFamily,
    trainers: dict[str, MetaTrainer],
    command: str,
    tracking_run: str | None,
) -> dict[str, Any]:
    runs: dict[str, dict[str, Any]] = {}
    for network, trainer in trainers.items():
        done = trainer.progression
        runs[network] = {
            "meta_steps": done.meta_step,
            "chosen_at": done.best_step,
            "validation": done.best,
            "validations": done.validations,
            "starts": done.starts,
            "search": done.searched,
            "skipped": done.skipped,
            "seconds": round(done.seconds, 1),
        }
        if done.openness:
            runs[network]["openness"] = done.best_openness
    return {
        "name": name,
        "mode": recipe.mode,
        "family": {"name": family.name, "settings": family.settings()},
        "training": {"command": command, "recipe": recipe.table(), "runs": runs, "tracking_run": tracking_run},
        "results": {},
        "limits": [],
    }
