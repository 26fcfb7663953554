"""Recipes, and meta-training through truncated, differentiable unrolls."""

from metateleport.training.meta_seeds import tracking_run_of, train_meta_seeds
from metateleport.training.progression import Progression
from metateleport.training.recipe import (
    FamilySettings,
    OuterSettings,
    Recipe,
    TrainingError,
    ValidationSettings,
    device_for,
)
from metateleport.training.recipe_file import load_recipe
from metateleport.training.stack_optimizer import StackOptimizer
from metateleport.training.train import Interrupted, train
from metateleport.training.trainer import MetaTrainer
from metateleport.training.unroll import Unroll, log_losses

__all__ = [
    "FamilySettings",
    "Interrupted",
    "MetaTrainer",
    "OuterSettings",
    "Progression",
    "Recipe",
    "StackOptimizer",
    "TrainingError",
    "Unroll",
    "ValidationSettings",
    "device_for",
    "load_recipe",
    "log_losses",
    "tracking_run_of",
    "train",
    "train_meta_seeds",
]
