"""Recipes in files: found by the name of a checkpoint, and read from TOML or from a card."""

from __future__ import annotations

from pathlib import Path

from metateleport.checkpoint import RECIPE, CheckpointError, read_card, shipped_checkpoints
from metateleport.settings import SettingsError, from_toml
from metateleport.training.recipe import Recipe, TrainingError

__all__ = ["load_recipe", "recipe_name"]


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Loads a recipe.

    Args:
        name_or_path: a TOML file, the folder of a checkpoint, or the bare name of a shipped one. A checkpoint without
            `recipe.toml` has its recipe in its card.

    Returns:
        The recipe.

    Raises:
        TrainingError: if there is no recipe there.
        SettingsError: if a setting is not allowed; the message names the file and the setting.

    Example:
        >>> load_recipe("digits").rule.kind
        'adaptive'
    """
    path = _found(name_or_path)
    if path.is_file():
        return _read(path)
    try:
        training = read_card(path).get("training")
    except CheckpointError as error:
        raise TrainingError(f"{name_or_path} has no {RECIPE}, and no card to read its recipe from: {error}") from error
    recipe = training.get("recipe") if isinstance(training, dict) else None
    if not isinstance(recipe, dict):
        raise TrainingError(f"the card of {path} does not say how it was trained: give a recipe's file")
    return Recipe.read(recipe)


def recipe_name(name_or_path: str | Path) -> str:
    """The name of a recipe: that of its checkpoint, or of its file.

    Example:
        >>> recipe_name("checkpoints/digits/recipe.toml"), recipe_name("short.toml")
        ('digits', 'short')
    """
    path = Path(name_or_path)
    return path.resolve().parent.name if path.name == RECIPE else path.stem


def _read(path: Path) -> Recipe:
    try:
        # Editors of Windows put a mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    tables = from_toml(text, str(path))
    try:
        return Recipe.read(tables)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def _found(name_or_path: str | Path) -> Path:
    """The recipe's file, or the folder of a checkpoint that has none."""
    path, known = Path(name_or_path), shipped_checkpoints()
    if path.is_file():
        return path
    folder = path if path.is_dir() else known.get(str(name_or_path))
    if folder is None:
        raise TrainingError(
            f"there is no recipe {str(name_or_path)!r}: known by name are {', '.join(known) or 'none'}; any other is "
            "given by the path of its file or of a checkpoint's folder"
        )
    return folder / RECIPE if (folder / RECIPE).is_file() else folder
