"""Several meta-trainings by one recipe from different seeds, combined into one checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from metateleport.checkpoint.checkpoint import CARD, read_card
from metateleport.checkpoint.seeds import combine_meta_seeds
from metateleport.families import load_family
from metateleport.interruption import stoppable
from metateleport.training.distributed import ALONE, Ranks
from metateleport.training.progression import Progression
from metateleport.training.recipe import Recipe, TrainingError
from metateleport.training.recipe_file import load_recipe
from metateleport.training.start import check_start, held
from metateleport.training.state import begun, first_difference, read_state, resume_folder, seeds_folder
from metateleport.training.train import interrupted, train

__all__ = ["seeds_folder", "tracking_run_of", "train_meta_seeds"]


def train_meta_seeds(
    recipe: Recipe,
    out: str | Path,
    seeds: int,
    resume: bool = False,
    report: Callable[[str, Progression, float], None] | None = None,
    command: str = "",
    tracking_run: str | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Meta-trains from several seeds, one after another, and writes one checkpoint.

    The checkpoint is that of the seed with the best validation score; the others are inside its folder, see
    `metateleport.checkpoint.seeds.combine_meta_seeds`.

    Args:
        recipe: the recipe. The seeds are `outer.seed`, `outer.seed + 1`, and so on; `outer.seconds` is for each seed.
        out: folder of the checkpoint.
        seeds: number of seeds.
        resume: go on where it was interrupted; the recipe has to be the same, the number of seeds may differ.
        report: called after every meta-step as by `train`, with `seed N/` before the name of the network.
        command: the command that this run was started by, for the cards.
        tracking_run: as for `train`; all seeds are tracked in one run.
        ranks: the processes that share the tasks of every seed, as in `train`.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: if settings cannot work, there is nothing to resume, or it was started with other settings.
        FamilyError: if the task family cannot be loaded.
        FileError: if there is no right or no space to write, or another training writes there.
        Interrupted: as for `train`.
    """
    if seeds < 1:
        raise TrainingError(f"a training needs at least one meta-seed, not {seeds}")
    done = seeds_folder(out)
    said = f"interrupted; finished meta-seeds are in {done}, and the same command with --resume goes on"
    with interrupted(lambda: said), stoppable(), held(out) if ranks.first else contextlib.nullcontext():
        recipe = recipe.of_family(load_family(recipe.family.name, recipe.family.settings))
        ranks.from_first(lambda: check_start(recipe, out, resume, seeds, restarted=bool(ranks.restarts)))
        tracking_run = tracking_run or tracking_run_of(out)
        paths = _each(recipe, done, seeds, report, command, tracking_run, ranks)
        ranks.from_first(lambda: _combine(paths, out, done))
        if ranks.first:
            shutil.rmtree(done, ignore_errors=True)
        return Path(out)


def _each(
    recipe: Recipe,
    done: Path,
    seeds: int,
    report: Callable[[str, Progression, float], None] | None,
    command: str,
    tracking_run: str | None,
    ranks: Ranks,
) -> list[Path]:
    """Trains the seeds that are not finished; the folders of all of them."""
    outer, first = recipe.outer, recipe.outer.seed
    recipes = {
        seed: dataclasses.replace(recipe, outer=dataclasses.replace(outer, seed=seed))
        for seed in range(first, first + seeds)
    }
    paths = []
    for seed, one in recipes.items():
        path = done / str(seed)
        finished, goes_on = ranks.from_first(functools.partial(_state_of, path, one))
        if not finished:
            train(one, path, goes_on, _named(f"seed {seed}", report), command, tracking_run, ranks)
        paths.append(path)
    return paths


def _combine(paths: list[Path], out: str | Path, done: Path) -> str:
    try:
        return str(combine_meta_seeds(paths, out))
    except OSError as error:
        raise TrainingError(
            f"the checkpoint {out} cannot be written ({error.strerror or error}): all meta-seeds are in {done}, and "
            "the same command with --resume combines them"
        ) from error


def _state_of(path: Path, recipe: Recipe) -> tuple[bool, bool]:
    """Whether a seed is finished, by the same recipe, and whether it is begun."""
    if path.exists():
        _has_settings(path, recipe)
    return path.exists(), begun(resume_folder(path))


def tracking_run_of(out: str | Path) -> str | None:
    """The id of the MLflow run of an unfinished training, which `--resume` goes on with.

    Args:
        out: folder of the checkpoint that it is going to write.

    Returns:
        The id; None if nothing is unfinished there, or it is not tracked.

    Raises:
        TrainingError: if its state is damaged.
        CheckpointError: if a finished meta-seed cannot be read.
    """
    done = seeds_folder(out)
    seeds = sorted(done.iterdir()) if done.is_dir() else []
    for folder in (resume_folder(out), *seeds):
        state = read_state(folder)
        if state is not None and state.tracking_run is not None:
            return state.tracking_run
    for folder in seeds:
        if (folder / CARD).exists():
            found = read_card(folder).get("training", {}).get("tracking_run")
            if found is not None:
                return str(found)
    return None


def _named(
    seed: str, report: Callable[[str, Progression, float], None] | None
) -> Callable[[str, Progression, float], None] | None:
    if report is None:
        return None
    return lambda name, progression, share: report(f"{seed}/{name}", progression, share)


def _has_settings(path: Path, recipe: Recipe) -> None:
    started = load_recipe(path)
    # A file has the word "none" for None; the family knows for which of its settings.
    started = started.of_family(load_family(started.family.name, started.family.settings))
    changed = first_difference(started, recipe)
    if changed is not None:
        raise TrainingError(
            f"{path} was trained with {changed}: resume with the same settings, or remove {path.parent} and start anew"
        )
