"""Checkpoints: a folder with the weights in safetensors and a JSON card. Loading one runs no code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metateleport.checkpoint.card import CARD, SCHEMA, CheckpointError, read_card, sealed_for, write_card
from metateleport.checkpoint.weights import WEIGHTS, load_weights, save_weights
from metateleport.files import FileError, check_destination, replacing_folder, search_folders, write_json, write_text
from metateleport.learned import GaugeTeleporter, LearnedTeleporter, MetaOptimizer
from metateleport.settings import to_toml
from metateleport.sources import fetcher_of
from metateleport.teleporters import Teleporter
from metateleport.version import VERSION

__all__ = [
    "RECIPE",
    "SCHEMA",
    "Checkpoint",
    "CheckpointError",
    "MetaSeed",
    "check_place",
    "load",
    "load_checkpoint",
    "meta_optimizer_of",
    "read_card",
    "save_checkpoint",
    "seal",
    "shipped_checkpoints",
    "update_card",
]

SEEDS, RECIPE = "meta_seeds", "recipe.toml"


@dataclasses.dataclass(frozen=True)
class MetaSeed:
    """One of the meta-trainings that a checkpoint is chosen from.

    Args:
        seed: seed of its networks and training tasks.
        validation: its score on the validation tasks, which are the same for all meta-seeds; smaller is better.
        path: its folder, as `load_checkpoint` takes it; the checkpoint's own folder for the chosen meta-seed.
    """

    seed: int
    validation: float
    path: Path


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Args:
        path: its folder.
        card: on what and how it was trained, its results, and its limits.
        learned: the meta-optimizer.
        step_only: a meta-optimizer trained by the same recipe without teleports, for attribution; None in mode `tele`
            and in modes without a teleport.
        meta_seeds: all meta-trainings that it was chosen from, in the order of their seeds, its own included; empty if
            there was only one.
    """

    path: Path
    card: dict[str, Any]
    learned: MetaOptimizer
    step_only: MetaOptimizer | None
    meta_seeds: tuple[MetaSeed, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def mode(self) -> str:
        """What is learned: one of `metateleport.learned.MODES`."""
        return self.learned.config.mode


def shipped_checkpoints() -> dict[str, Path]:
    """The checkpoint folders that bare names stand for, wherever the process runs.

    Searched are the folder that `METATELEPORT_CHECKPOINTS` names, then `checkpoints/` in the working folder, then the
    project's own.
    """
    found: dict[str, Path] = {}
    for folder in search_folders("checkpoints", "_checkpoints", "METATELEPORT_CHECKPOINTS"):
        for card in sorted(folder.glob(f"*/{CARD}")) if folder.is_dir() else ():
            found.setdefault(card.parent.name, card.parent)
    return found


def versions() -> dict[str, str]:
    """Versions of the libraries that a result may depend on."""
    return {
        "metateleport": VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def save_checkpoint(
    path: str | Path, learned: MetaOptimizer, step_only: MetaOptimizer | None, card: Mapping[str, Any]
) -> Path:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: the folder; an existing one is replaced.
        learned: the meta-optimizer.
        step_only: the meta-optimizer trained without teleports, or None.
        card: the card's entries, except those that are added here: schema, shape, versions, hash of the weights. The
            recipe in its entry `training` is written as `recipe.toml` too.

    Returns:
        The folder.

    Raises:
        CheckpointError: if an entry of the card is not allowed, or weights are not finite or of another dtype than the
            networks that a card describes.
    """
    weights = save_weights(learned, step_only)
    whole = sealed_for(
        path,
        {
            "schema": SCHEMA,
            "meta_optimizer": learned.config.table(),
            "step_only": None if step_only is None else step_only.config.table(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "versions": versions(),
            **card,
        },
    )
    with replacing_folder(path) as temporary:
        (temporary / WEIGHTS).write_bytes(weights)
        write_json(temporary / CARD, whole)
        write_recipe(temporary, whole)
    return Path(path)


def check_place(path: str | Path, size: int = 1 << 20) -> None:
    """Tries before any work whether a checkpoint can be written to a place.

    Args:
        path: the folder; one that has a checkpoint is going to be replaced.
        size: number of bytes that there has to be room for.

    Raises:
        FileError: if there is no right or no space, or something else is there, which is not replaced.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise FileError(f"{str(path)!r} has no name of its own: give the checkpoint's folder one")
    if path.exists() and not path.is_dir():
        raise FileError(f"{path} is a file, but a checkpoint is a folder: choose another place")
    if path.is_dir() and not (path / CARD).exists() and any(path.iterdir()):
        raise FileError(f"{path} has something else than a checkpoint in it, which would be lost: choose another place")
    if path.is_mount():
        raise FileError(f"{path} is a file system of its own, which cannot be replaced: give a folder inside it")
    check_destination(path, size)


def write_recipe(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes the recipe of a card, if it has one, into the checkpoint's folder.

    For several meta-seeds `outer.seed` is the first of them; the file's comment has the command with their number.
    """
    recipe = card.get("training", {}).get("recipe")
    if not recipe:
        return
    seeds = [each["seed"] for each in card.get(SEEDS, ())]
    number = f" --meta-seeds {len(seeds)}" if len(seeds) > 1 else ""
    own = {**recipe, "outer": {**recipe["outer"], "seed": min(seeds, default=recipe["outer"]["seed"])}}
    said = f"# metateleport train --recipe {RECIPE}{number} --out FOLDER\n"
    if own["outer"].get("start_from"):
        said += f"# It starts from the checkpoint {own['outer']['start_from']}, which has to be there.\n"
    write_text(folder / RECIPE, said + "\n" + to_toml(own))


def update_card(path: str | Path, changes: Mapping[str, Any]) -> None:
    """Replaces some entries of a checkpoint's card, whole or not at all; the card gets today's schema and its digest.

    Raises:
        CheckpointError: if the card cannot be read, or an entry is not allowed.
    """
    write_card(Path(path), {**read_card(Path(path)), **changes})


def seal(path: str | Path, edited: bool = False) -> list[Path]:
    """Writes the cards of a checkpoint and its meta-seeds in today's schema, each under a digest; weights stay.

    Args:
        path: the checkpoint's folder.
        edited: accept entries that a person has edited since the card was written; they are checked all the same.

    Returns:
        The folders whose cards were written; those that were as they should be are left alone.

    Raises:
        CheckpointError: if a card or weights cannot be read, or do not fit each other; then none is written.
    """
    top = _resolve(path)
    folders = [top, *sorted(each.parent for each in (top / SEEDS).glob(f"*/{CARD}"))]
    cards = {folder: _read(folder, edited) for folder in folders}
    written = []
    for folder, (card, _) in cards.items():
        whole = sealed_for(folder, card)
        if json.loads((folder / CARD).read_text()) != whole:
            write_card(folder, whole)
            written.append(folder)
    return written


def load_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Loads a checkpoint: its card and its meta-optimizers, on the CPU.

    Args:
        name_or_path: a folder, the bare name of a shipped checkpoint, or an address in MLflow: `models:/lora@champion`,
            `models:/lora/3`, `runs:/RUN`. Of the last its weights and card are downloaded.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: if it is missing, damaged, or of another version.
    """
    path = _resolve(name_or_path)
    card, (learned, step_only) = _read(path)
    return Checkpoint(path, card, learned, step_only, _meta_seeds(path, card))


def _read(path: Path, edited: bool = False) -> tuple[dict[str, Any], tuple[MetaOptimizer, MetaOptimizer | None]]:
    card = read_card(path, edited)
    return card, load_weights(path, card)


def load(name_or_path: str | Path) -> Teleporter:
    """Loads the learned teleporter of a checkpoint, to use it with any optimizer.

    If the checkpoint has learned gauges and no teleport that stays, the teleporter moves by the gauges' elements.

    Args:
        name_or_path: a folder, the bare name of a shipped checkpoint, or an address in MLflow: `models:/lora@champion`,
            `models:/lora/3`, `runs:/RUN`. Of the last weights and card are downloaded; no code of an artifact runs.

    Returns:
        The teleporter, in eval mode, on the CPU: a `LearnedTeleporter` or a `GaugeTeleporter`.

    Raises:
        CheckpointError: if it cannot be loaded, or its mode learns no group element.

    Example:
        >>> load("leaky_mlp").name
        'learned'
    """
    checkpoint = load_checkpoint(name_or_path)
    teleporter, gauge = checkpoint.learned.teleporter, checkpoint.learned.gauge
    if isinstance(teleporter, LearnedTeleporter):
        return teleporter.eval()
    if teleporter is not None:
        raise CheckpointError(
            f"the teleporter of {checkpoint.name}, of rule.kind = {checkpoint.learned.config.rule.kind!r}, serves only "
            "the model it was made for"
        )
    if gauge is not None:
        return GaugeTeleporter(gauge).eval()
    raise CheckpointError(
        f"{checkpoint.name} is of mode {checkpoint.mode!r}, which learns a step and no teleport: use "
        f"metateleport.LearnedOptimizer(model, {checkpoint.name!r}), or a checkpoint of a mode with 'tele'"
    )


def meta_optimizer_of(checkpoint: Checkpoint | str | Path) -> MetaOptimizer:
    """The meta-optimizer of a checkpoint that has a learned step.

    Raises:
        CheckpointError: if it cannot be loaded, or its mode learns no step.
    """
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    if not loaded.learned.config.steps:
        raise CheckpointError(
            f"{loaded.name} is of mode 'tele', which learns a teleport and no step: use "
            f"metateleport.TeleportingOptimizer(optimizer, model, metateleport.load({loaded.name!r}))"
        )
    return loaded.learned.eval()


def _resolve(name_or_path: str | Path) -> Path:
    fetch = fetcher_of(str(name_or_path))
    if fetch is not None:
        return fetch(str(name_or_path))
    path, known = Path(name_or_path), shipped_checkpoints()
    # A folder that has a checkpoint's name but no card does not hide the checkpoint.
    if str(name_or_path) in known and not (path / CARD).is_file():
        return known[str(name_or_path)]
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise CheckpointError(f"a checkpoint is a folder, and {path} is a file: give the folder that holds it")
    if str(name_or_path).startswith(("http://", "https://")):
        raise CheckpointError(
            f"{str(name_or_path)!r} is an address: LearnedOptimizer takes what a service there does as "
            f"metateleport.connect({str(name_or_path)!r}), and so does TeleportingOptimizer"
        )
    raise CheckpointError(
        f"there is no checkpoint {str(name_or_path)!r}: known by name are {', '.join(known) or 'none'}; "
        "any other is given by the path of its folder"
    )


def _meta_seeds(path: Path, card: Mapping[str, Any]) -> tuple[MetaSeed, ...]:
    listed = [
        MetaSeed(each["seed"], each["validation"], path if each["chosen"] else path / SEEDS / str(each["seed"]))
        for each in card.get(SEEDS, ())
    ]
    return tuple(sorted(listed, key=lambda each: each.seed))
