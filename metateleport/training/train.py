"""A whole meta-training run: the networks, their attribution twin without teleports, and the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from metateleport.checkpoint import save_checkpoint
from metateleport.families import TaskFamily, load_family
from metateleport.files import replacing_folder, write_json
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.config import TrainConfig, TrainingError, default_settings, device_for
from metateleport.training.progression import Progression, Snapshot
from metateleport.training.trainer import MetaTrainer
from metateleport.training.warm_start import warm_start, warm_start_checkpoint

__all__ = ["Interrupted", "resume_folder", "train"]

_LEARNED, _STEP_ONLY = "learned", "step-only"
_LOOKED_AT = 32


class Interrupted(Exception):
    """Training was interrupted and its state is saved; the message says where."""


def resume_folder(out: str | Path) -> Path:
    """Where the state of an unfinished training is kept, beside the checkpoint it will make."""
    out = Path(out)
    return out.with_name(f"{out.name}.unfinished")


def train(
    config: TrainConfig,
    out: str | Path,
    resume: bool = False,
    report: Callable[[str, Progression, float], None] | None = None,
    command: str = "",
) -> Path:
    """Meta-trains and writes a checkpoint.

    In a mode with a teleport a second meta-optimizer is trained by the same recipe without teleports, half of the
    time each: what the learned result is attributed by (`learned/step-only`) ships in the same checkpoint.

    Args:
        config: the settings.
        out: folder of the checkpoint.
        resume: go on with a training that was interrupted; the settings have to be the same.
        report: called after every meta-step with the network's name, its progression and its share done.
        command: the command that this run was started by, for the card.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: if settings cannot work, or there is nothing to resume, or it was started with other settings.
        FamilyError: if the task family cannot be loaded.
        Interrupted: after Ctrl-C, when the state has been saved.
    """
    device_for(config.device)
    family = load_family(config.family, config.settings)
    trainers = _trainers(config, family)
    saved = resume_folder(out)
    if resume:
        _restore(saved, config, trainers)
    elif saved.exists():
        raise TrainingError(f"{saved} holds an unfinished training: add --resume to go on with it, or remove it")
    try:
        for name, trainer in trainers.items():
            trainer.run(_reporting(name, trainer, report, saved, config, trainers))
    except KeyboardInterrupt:
        _save(saved, config, trainers)
        raise Interrupted(f"interrupted; the state is in {saved}, and the same command with --resume goes on") from None
    learned = trainers[_LEARNED].best_meta()
    step_only = trainers[_STEP_ONLY].best_meta() if _STEP_ONLY in trainers else None
    path = save_checkpoint(out, learned, step_only, _card(Path(out).name, config, family, trainers, command))
    shutil.rmtree(saved, ignore_errors=True)
    return path


def _trainers(config: TrainConfig, family: TaskFamily) -> dict[str, MetaTrainer]:
    example = family.stack([0], "train", config.seed, config.torch_dtype)
    groups = _groups(family, config)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    if config.network == "flat":
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in example.tensors().items())
    shape = config.meta_optimizer_config(groups, shapes)
    if shape.teleports and not groups:
        raise TrainingError(f"{config.family} names no symmetries with these settings: train mode 'update' or 'lr'")
    wanted = {_LEARNED: shape}
    if shape.teleports and shape.steps:
        wanted[_STEP_ONLY] = shape.without_teleport()
    seconds = None if config.seconds is None else config.seconds / len(wanted)
    trainers = {}
    source = None if config.start_from is None else warm_start_checkpoint(config.start_from, config.seed)
    for name, each in wanted.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            meta = MetaOptimizer(each)
        if source is not None:
            warm_start(meta, source, step_only=name == _STEP_ONLY)
        trainers[name] = MetaTrainer(config, family, meta, config.meta_steps, seconds)
    return trainers


def _groups(family: TaskFamily, config: TrainConfig) -> tuple[str, ...]:
    """Names of the groups that the tasks of a training have, over the settings that it varies."""
    families = [family]
    if config.network != "flat":
        families += [family.augmented(number, config.seed) for number in range(_LOOKED_AT)]
    tasks = [each.task(0, "train", config.seed, config.torch_dtype) for each in dict.fromkeys(families)]
    return tuple(dict.fromkeys(symmetry.group.name for task in tasks for symmetry in task.symmetries))


def _reporting(
    name: str,
    trainer: MetaTrainer,
    report: Callable[[str, Progression, float], None] | None,
    saved: Path,
    config: TrainConfig,
    trainers: dict[str, MetaTrainer],
) -> Callable[[Progression], None]:
    def reported(progression: Progression) -> None:
        if progression.meta_step % config.validation_every == 0:
            _save(saved, config, trainers)
        if report is not None:
            report(name, progression, trainer.share_of_all)

    return reported


def settings_that_count(config: TrainConfig) -> dict[str, Any]:
    """What has to be equal between a training and its resumption: all but the device."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name not in ("device",)}


def settings_known(started: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a training was started with; what an earlier version did not know had its default's effect."""
    return {**default_settings(), **started}


def _save(folder: Path, config: TrainConfig, trainers: dict[str, MetaTrainer]) -> None:
    with replacing_folder(folder) as temporary:
        states = {}
        for name, trainer in trainers.items():
            for part, snapshot in {name: trainer.boundary, f"{name}-kept": trainer.boundary.kept}.items():
                if snapshot is not None:
                    save_file(snapshot.tensors, temporary / f"{part}.safetensors")
                    # JSON knows no infinity; the score before the first validation is one.
                    best = min(snapshot.progression["best"], 1e300)
                    states[part] = {**snapshot.progression, "best": best}
        write_json(temporary / "state.json", {"config": settings_that_count(config), "progressions": states})


def _restore(folder: Path, config: TrainConfig, trainers: dict[str, MetaTrainer]) -> None:
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        raise TrainingError(f"there is nothing to resume: {folder} does not exist. Start without --resume") from None
    except ValueError as error:
        raise TrainingError(
            f"{folder / 'state.json'} cannot be read ({error}): remove {folder} and start anew"
        ) from error
    wanted, started = settings_that_count(config), state.get("config") if isinstance(state, dict) else None
    if not isinstance(started, dict):
        raise TrainingError(f"{folder / 'state.json'} is not the state of a training: remove {folder} and start anew")
    started = settings_known(started)
    changed = [name for name, value in wanted.items() if started.get(name) != value]
    if changed:
        raise TrainingError(
            f"the training in {folder} was started with {changed[0]}={started.get(changed[0])!r}, not "
            f"{wanted[changed[0]]!r}: resume with the same settings, or remove the folder and start anew"
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
    name: str, config: TrainConfig, family: TaskFamily, trainers: dict[str, MetaTrainer], command: str
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
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    return {
        "name": name,
        "mode": config.mode,
        "family": {"name": family.name, "settings": family.settings()},
        "training": {"command": command, "config": settings, "runs": runs},
        "results": {},
        "limits": [],
    }
