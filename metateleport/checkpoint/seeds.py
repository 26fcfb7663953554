"""One checkpoint of several meta-seeds: the best in its folder, the others in a folder inside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metateleport.checkpoint.card import write_card
from metateleport.checkpoint.checkpoint import (
    SEEDS,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    check_place,
    load_checkpoint,
    write_recipe,
)
from metateleport.files import replacing_folder
from metateleport.settings import flattened

__all__ = ["combine_meta_seeds", "each_meta_seed"]

# Recipes that differ in these settings alone count as the same.
_MAY_DIFFER = ("outer.seed", "outer.device")


def combine_meta_seeds(paths: Sequence[str | Path], into: str | Path) -> Path:
    """Combines checkpoints that were trained by the same recipe from different seeds into one.

    The one with the best validation score is the checkpoint that `load` finds; the others are whole checkpoints in its
    `meta_seeds/SEED`. The card lists all of them with their scores. Results in the cards are left out, as each is of a
    single seed.

    Args:
        paths: folders or bare names of checkpoints; one of several meta-seeds contributes all of them.
        into: the folder to write, whole or not at all; an existing one is replaced. It may be one of `paths`.

    Returns:
        The folder.

    Raises:
        CheckpointError: if one cannot be loaded, was not made by `metateleport train`, two have the same seed, or
            their recipes differ.
        FileError: if there is no right or no space to write, or something else than a checkpoint is there.
    """
    found = [seed for path in paths for seed in each_meta_seed(load_checkpoint(path))]
    if not found:
        raise CheckpointError("there are no checkpoints to combine: give the folders of at least one")
    by_seed: dict[int, Checkpoint] = {}
    first = _recipe(found[0])
    for each in found:
        seed, recipe = _seed(each), _recipe(each)
        if seed in by_seed:
            raise CheckpointError(f"{by_seed[seed].path} and {each.path} are both of seed {seed}: give one of them")
        for name in first.keys() | recipe.keys():
            if first.get(name) != recipe.get(name):
                raise CheckpointError(
                    f"{found[0].path} and {each.path} are not of one recipe: {name} is {first.get(name)!r} in one and "
                    f"{recipe.get(name)!r} in the other"
                )
        by_seed[seed] = each
    by_seed = dict(sorted(by_seed.items()))
    best = min(by_seed, key=lambda seed: (_validation(by_seed[seed]), seed))
    listed = [{"seed": seed, "validation": _validation(each), "chosen": seed == best} for seed, each in by_seed.items()]
    into = Path(into)
    check_place(into, sum((each.path / WEIGHTS).stat().st_size for each in by_seed.values()) + (1 << 20))
    with replacing_folder(into) as temporary:
        for seed, each in by_seed.items():
            folder = temporary if seed == best else temporary / SEEDS / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(each.path / WEIGHTS, folder / WEIGHTS)
            card = {**each.card, "results": {}}
            card.pop(SEEDS, None)
            card = {**card, "name": into.name, SEEDS: listed} if seed == best else card
            write_card(folder, card)
            write_recipe(folder, card)
    return into


def each_meta_seed(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Loads all meta-seeds of a checkpoint, in the order of their seeds; the checkpoint alone if it has only one.

    Raises:
        CheckpointError: if one cannot be loaded.
    """
    if not checkpoint.meta_seeds:
        return [checkpoint]
    return [
        checkpoint if seed.path == checkpoint.path else load_checkpoint(seed.path) for seed in checkpoint.meta_seeds
    ]


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    training = checkpoint.card.get("training")
    if not isinstance(training, dict) or not isinstance(training.get("recipe"), dict):
        raise CheckpointError(f"the card of {checkpoint.path} does not say how it was trained: train it anew")
    return training


def _seed(checkpoint: Checkpoint) -> int:
    return int(_training(checkpoint)["recipe"]["outer"]["seed"])


def _validation(checkpoint: Checkpoint) -> float:
    return float(_training(checkpoint)["runs"]["learned"]["validation"])


def _recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    known = flattened(_training(checkpoint)["recipe"])
    return {name: value for name, value in known.items() if name not in _MAY_DIFFER}
