"""A whole meta-training: the networks, those of the step alone for attribution, and the checkpoint."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from metateleport.checkpoint import save_checkpoint
from metateleport.families import TaskFamily, load_family
from metateleport.interruption import Stopped, code_of, stoppable
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.distributed import ALONE, RankLostError, Ranks
from metateleport.training.progression import Progression, Snapshot
from metateleport.training.recipe import Recipe, TrainingError, device_for
from metateleport.training.start import check_start, held
from metateleport.training.state import (
    TrainingState,
    begun,
    different,
    nothing_to_resume,
    read_state,
    resume_folder,
    write_state,
)
from metateleport.training.trainer import MetaTrainer
from metateleport.training.warm_start import warm_start, warm_start_checkpoint

__all__ = ["Interrupted", "interrupted", "train"]

_LEARNED, _STEP_ONLY = "learned", "step-only"
_LOOKED_AT = 32


class Interrupted(Exception):
    """The training was interrupted, and the message says where its state is.

    Args:
        message: for people.
        number: the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    report: Callable[[str, Progression, float], None] | None = None,
    command: str = "",
    tracking_run: str | None = None,
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
        FileError: if there is no right or no space to write, or another training writes there.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, once the state is saved; a second signal ends the process at once.
        RankLostError: if another process is lost, once the state is saved.
    """
    saved = resume_folder(out)
    with interrupted(lambda: _untouched(saved)), stoppable(), held(out) if ranks.first else contextlib.nullcontext():
        device_for(recipe.outer.device)
        family = load_family(recipe.family.name, recipe.family.settings)
        recipe = recipe.of_family(family)
        ranks.from_first(lambda: check_start(recipe, out, resume, restarted=bool(ranks.restarts)))
        trainers = _trainers(recipe, family, ranks)
        kept = _begin(saved, recipe, trainers, resume, ranks)
        saver = _Saver(saved, recipe, trainers, tracking_run or kept)
        return _trained(recipe, family, trainers, saver, Path(out), report, command, ranks)


class _Saver:
    """Saves the state of a training, and knows what the last whole state is."""

    def __init__(
        self, folder: Path, recipe: Recipe, trainers: dict[str, MetaTrainer], tracking_run: str | None
    ) -> None:
        self.folder, self.recipe, self.trainers, self.tracking_run = folder, recipe, trainers, tracking_run
        self.last = self.meta_steps if begun(folder) else None

    @property
    def meta_steps(self) -> int:
        """Meta-steps of all networks up to the state that would be saved now."""
        return sum(trainer.boundary.progression["meta_step"] for trainer in self.trainers.values())

    def save(self) -> None:
        """Saves the state.

        Raises:
            TrainingError: if it cannot be written; the message says where the last whole state is.
        """
        snapshots = {name: trainer.boundary for name, trainer in self.trainers.items()}
        try:
            write_state(self.folder, TrainingState(self.recipe, snapshots, self.tracking_run))
        except OSError as error:
            raise TrainingError(f"the state cannot be written ({error.strerror or error}): {self.where}") from error
        self.last = self.meta_steps

    @property
    def where(self) -> str:
        """A sentence on where the last whole state is, and how to go on from it."""
        if self.last is None:
            return f"nothing is saved in {self.folder}; make room there, or choose another place, and start anew"
        return (
            f"the last whole state, after {self.last} meta-steps, is in {self.folder}, and the same command with "
            "--resume goes on from it"
        )

    def remove_if_untouched(self) -> None:
        """Removes a state that nothing has been added to, so that a training that cannot work leaves nothing behind."""
        done = [trainer.progression for trainer in self.trainers.values()]
        if not any(each.meta_step or each.searched or each.starts for each in done):
            shutil.rmtree(self.folder, ignore_errors=True)


def _trained(
    recipe: Recipe,
    family: TaskFamily,
    trainers: dict[str, MetaTrainer],
    saver: _Saver,
    out: Path,
    report: Callable[[str, Progression, float], None] | None,
    command: str,
    ranks: Ranks,
) -> Path:
    try:
        if ranks.first:
            # A state from the start on: whatever ends the process, --resume goes on with the same MLflow run.
            saver.save()
        for name, trainer in trainers.items():
            trainer.run(_reporting(name, trainer, report, saver) if ranks.first else None)
        if ranks.first:
            learned = trainers[_LEARNED].best_meta()
            step_only = trainers[_STEP_ONLY].best_meta() if _STEP_ONLY in trainers else None
            card = _card(out.name, recipe, family, trainers, command, saver.tracking_run, ranks)
            _write(out, learned, step_only, card, saver)
            shutil.rmtree(saver.folder, ignore_errors=True)
        ranks.meet()
    except KeyboardInterrupt as stopped:
        if not ranks.first:
            raise
        # The launcher ends the others where one is lost.
        raise Stopped(_saved(saver, ranks.ended() or "interrupted"), code_of(stopped) - 128) from None
    except RankLostError as lost:
        if not ranks.first:
            raise
        saver.save()
        raise RankLostError(f"{lost}; {saver.where}") from lost
    except Exception:
        if ranks.first:
            saver.remove_if_untouched()
        raise
    return out


def _write(
    out: Path, learned: MetaOptimizer, step_only: MetaOptimizer | None, card: dict[str, Any], saver: _Saver
) -> None:
    try:
        save_checkpoint(out, learned, step_only, card)
    except OSError as error:
        with contextlib.suppress(TrainingError):
            saver.save()
        raise TrainingError(
            f"the checkpoint {out} cannot be written ({error.strerror or error}): {saver.where}"
        ) from error


def _saved(saver: _Saver, why: str) -> str:
    try:
        saver.save()
    except TrainingError as error:
        return f"{why}; {error}"
    return f"{why}; the state is in {saver.folder}, and the same command with --resume goes on"


@contextlib.contextmanager
def interrupted(otherwise: Callable[[], str]) -> Iterator[None]:
    """Makes an `Interrupted` of what ends a block by a signal.

    Args:
        otherwise: what to say if that says nothing itself.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise Interrupted(str(stopped) or otherwise(), code_of(stopped) - 128) from None


def _untouched(folder: Path) -> str:
    if begun(folder):
        return f"interrupted; the state in {folder} is as it was, and --resume goes on with it"
    return "interrupted before anything was trained: nothing is saved"


def _begin(saved: Path, recipe: Recipe, trainers: dict[str, MetaTrainer], resume: bool, ranks: Ranks) -> str | None:
    """Restores what the first process has saved, in all processes, if the training is to go on.

    Returns:
        The MLflow run that it was tracked in.
    """

    def restored() -> list[Any]:
        if resume or (ranks.restarts and begun(saved)):
            return [True, _restore(saved, recipe, trainers).tracking_run]
        return [False, None]

    goes_on, tracking_run = ranks.from_first(restored)
    if goes_on and not ranks.alone:
        for trainer in trainers.values():
            trainer.restore(_from_first(trainer.boundary, ranks))
    return None if tracking_run is None else str(tracking_run)


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
    name: str, trainer: MetaTrainer, report: Callable[[str, Progression, float], None] | None, saver: _Saver
) -> Callable[[Progression], None]:
    def reported(progression: Progression) -> None:
        if progression.meta_step % trainer.recipe.validation.every == 0:
            saver.save()
        if report is not None:
            report(name, progression, trainer.share_of_all)

    return reported


def _restore(folder: Path, recipe: Recipe, trainers: dict[str, MetaTrainer]) -> TrainingState:
    state = read_state(folder)
    if state is None:
        raise nothing_to_resume(folder)
    changed = different(folder, state.recipe, recipe)
    if changed is not None:
        raise changed
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
    ranks: Ranks,
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
        if done.scored_steps:
            runs[network]["validated_steps"] = done.scored_steps
        if done.openness:
            runs[network]["openness"] = done.best_openness
    several = {} if ranks.alone else {"processes": ranks.size}
    return {
        "name": name,
        "mode": recipe.mode,
        "family": {"name": family.name, "settings": family.settings()},
        "training": {
            "command": command,
            "recipe": recipe.table(),
            "runs": runs,
            "tracking_run": tracking_run,
            **several,
        },
        "results": {},
        "limits": _limits(recipe, trainers),
    }


def _limits(recipe: Recipe, trainers: dict[str, MetaTrainer]) -> list[str]:
    """What the card says of a training whose time was too short for what its recipe asks for."""
    short = [trainer.progression.scored_steps for trainer in trainers.values() if trainer.progression.scored_steps]
    if not short or min(short) >= recipe.outer.horizon:
        return []
    return [
        f"Its networks were chosen by validations of {min(short)} inner steps, and not of outer.horizon = "
        f"{recipe.outer.horizon}: more would have taken too much of outer.seconds = {recipe.outer.seconds:g}."
    ]
