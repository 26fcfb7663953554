"""A whole meta-training: the networks, those of the step alone for attribution, and the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from metateleport.checkpoint import save_checkpoint
from metateleport.families import TaskFamily, load_family
from metateleport.files import replacing_folder, write_json
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.training.distributed import ALONE, RankLostError, Ranks
from metateleport.training.progression import Progression, Snapshot
from metateleport.training.recipe import Recipe, TrainingError, device_for
from metateleport.training.trainer import MetaTrainer
from metateleport.training.warm_start import warm_start, warm_start_checkpoint

__all__ = ["Interrupted", "resume_folder", "train"]

_LEARNED, _STEP_ONLY = "learned", "step-only"
_LOOKED_AT = 32


class Interrupted(Exception):
    """The training was interrupted and its state is saved; the message says where."""


def resume_folder(out: str | Path) -> Path:
    """The folder beside the final checkpoint where the state of an unfinished training is saved."""
    out = Path(out)
    return out.with_name(f"{out.name}.unfinished")


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    report: Callable[[str, Progression, float], None] | None = None,
    command: str = "",
    ranks: Ranks = ALONE,
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
        ranks: the processes that share the tasks, each of which calls this function; the first alone writes. Where
            `torchrun` has started them anew, they go on from the state that was saved last.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: if settings cannot work, there is nothing to resume, or it was started with other settings.
        FamilyError: if the task family cannot be loaded.
        Interrupted: after Ctrl-C, once the state is saved.
        RankLostError: if another process is lost, once the state is saved.
    """
    device_for(recipe.outer.device)
    family = load_family(recipe.family.name, recipe.family.settings)
    recipe = recipe.of_family(family)
    trainers = _trainers(recipe, family, ranks)
    saved = resume_folder(out)
    _begin(saved, recipe, trainers, resume, ranks)
    try:
        for name, trainer in trainers.items():
            writes = _reporting(name, trainer, report, saved, recipe, trainers)
            trainer.run(writes if ranks.first else None)
        if ranks.first:
            learned = trainers[_LEARNED].best_meta()
            step_only = trainers[_STEP_ONLY].best_meta() if _STEP_ONLY in trainers else None
            card = _card(Path(out).name, recipe, family, trainers, command, ranks)
            save_checkpoint(out, learned, step_only, card)
            shutil.rmtree(saved, ignore_errors=True)
        ranks.meet()
    except KeyboardInterrupt:
        if ranks.first:
            _save(saved, recipe, trainers)
        raise Interrupted(f"interrupted; the state is in {saved}, and the same command with --resume goes on") from None
    except RankLostError as lost:
        if not ranks.first:
            raise
        _save(saved, recipe, trainers)
        raise RankLostError(f"{lost}; the state is in {saved}, and the same command with --resume goes on") from lost
    return Path(out)


def _begin(saved: Path, recipe: Recipe, trainers: dict[str, MetaTrainer], resume: bool, ranks: Ranks) -> None:
    """Restores what the first process has saved, in all processes, if the training is to go on."""

    def restored() -> bool:
        if resume or (ranks.restarts and saved.exists()):
            _restore(saved, recipe, trainers)
            return True
        if saved.exists():
            raise TrainingError(f"{saved} holds an unfinished training: add --resume to go on with it, or remove it")
        return False

    if ranks.from_first(restored) and not ranks.alone:
        for trainer in trainers.values():
            trainer.restore(_from_first(trainer.boundary, ranks))


def _from_first(snapshot: Snapshot, ranks: Ranks) -> Snapshot:
    """The first process's snapshot; that of another only tells nothing."""
    kept = (
        _from_first(snapshot.kept or snapshot, ranks) if ranks.from_first(lambda: snapshot.kept is not None) else None
    )
    tensors = load(ranks.bytes_from_first(save(snapshot.tensors)))
    return Snapshot(tensors, ranks.from_first(lambda: snapshot.progression), kept)


def _trainers(recipe: Recipe, family: TaskFamily, ranks: Ranks) -> dict[str, MetaTrainer]:
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
        trainers[name] = MetaTrainer(recipe, family, meta, seconds, ranks)
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
    saved: Path,
    recipe: Recipe,
    trainers: dict[str, MetaTrainer],
) -> Callable[[Progression], None]:
    def reported(progression: Progression) -> None:
        if progression.meta_step % recipe.validation.every == 0:
            _save(saved, recipe, trainers)
        if report is not None:
            report(name, progression, trainer.share_of_all)

    return reported


def first_difference(started: Recipe, wanted: Recipe) -> str | None:
    """A sentence on the first setting that differs from the one at the start; the device may differ.

    Example:
        >>> from metateleport.training import FamilySettings, TruncatedSettings
        >>> recipes = (Recipe(FamilySettings("digits"), outer=TruncatedSettings(seed=seed)) for seed in (1, 2))
        >>> first_difference(*recipes)
        'outer.seed = 1, not 2'
    """
    before, now = started.flat(), wanted.flat()
    for key in (*now, *before):
        if key != "outer.device" and before.get(key) != now.get(key):
            return f"{key} = {before.get(key)!r}, not {now.get(key)!r}"
    return None


def _save(folder: Path, recipe: Recipe, trainers: dict[str, MetaTrainer]) -> None:
    with replacing_folder(folder) as temporary:
        states = {}
        for name, trainer in trainers.items():
            for part, snapshot in {name: trainer.boundary, f"{name}-kept": trainer.boundary.kept}.items():
                if snapshot is not None:
                    save_file(snapshot.tensors, temporary / f"{part}.safetensors")
                    # JSON has no infinity, which is the score before the first validation.
                    best = min(snapshot.progression["best"], 1e300)
                    states[part] = {**snapshot.progression, "best": best}
        write_json(temporary / "state.json", {"recipe": recipe.table(), "progressions": states})


def _restore(folder: Path, recipe: Recipe, trainers: dict[str, MetaTrainer]) -> None:
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        raise TrainingError(f"there is nothing to resume: {folder} does not exist. Start without --resume") from None
    except ValueError as error:
        raise TrainingError(
            f"{folder / 'state.json'} cannot be read ({error}): remove {folder} and start anew"
        ) from error
    if isinstance(state, dict) and "config" in state:
        raise TrainingError(
            f"the training in {folder} was begun by metateleport 0.2 or earlier, which kept its settings otherwise: "
            "finish it with that version, or remove the folder and start anew"
        )
    try:
        started = Recipe.read(state["recipe"])
    except (TypeError, KeyError, AttributeError, SettingsError) as error:
        raise TrainingError(
            f"{folder / 'state.json'} is not the state of a training ({error}): remove {folder} and start anew"
        ) from error
    changed = first_difference(started, recipe)
    if changed is not None:
        raise TrainingError(
            f"the training in {folder} was started with {changed}: resume with the same settings, or remove the folder "
            "and start anew"
        )
    for name, trainer in trainers.items():
        try:
            kept, progressions = f"{name}-kept", state["progressions"]
            best = _read(folder, kept, progressions[kept]) if kept in progressions else None
            trainer.restore(dataclasses.replace(_read(folder, name, progressions[name]), kept=best))
        except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"the state of {name} in {folder} is damaged or of another version ({error}): remove {folder} and "
                "start anew"
            ) from error


def _read(folder: Path, name: str, progression: dict[str, Any]) -> Snapshot:
    return Snapshot(load_file(folder / f"{name}.safetensors"), progression)


def _card(
    name: str, recipe: Recipe, family: TaskFamily, trainers: dict[str, MetaTrainer], command: str, ranks: Ranks
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
    several = {} if ranks.alone else {"processes": ranks.size}
    return {
        "name": name,
        "mode": recipe.mode,
        "family": {"name": family.name, "settings": family.settings()},
        "training": {"command": command, "recipe": recipe.table(), "runs": runs, **several},
        "results": {},
        "limits": [],
    }
