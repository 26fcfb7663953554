"""Recipes, and meta-training through truncated, differentiable unrolls."""

from metateleport.training.distributed import RankLostError, Ranks, joined
from metateleport.training.meta_seeds import tracking_run_of, train_meta_seeds
from metateleport.training.outer import EvolutionSettings, OuterSettings, PersistentSettings, TruncatedSettings
from metateleport.training.progression import Progression
from metateleport.training.recipe import FamilySettings, Recipe, TrainingError, ValidationSettings, device_for
from metateleport.training.recipe_file import load_recipe
from metateleport.training.stack_optimizer import StackOptimizer
from metateleport.training.start import check_start, held
from metateleport.training.train import Interrupted, train
from metateleport.training.trainer import MetaTrainer
from metateleport.training.unroll import Unroll, log_losses

__all__ = [
    "EvolutionSettings",
    "FamilySettings",
    "Interrupted",
    "MetaTrainer",
    "OuterSettings",
    "PersistentSettings",
    "Progression",
    "RankLostError",
    "Ranks",
    "Recipe",
    "StackOptimizer",
    "TrainingError",
    "TruncatedSettings",
    "Unroll",
    "ValidationSettings",
    "check_start",
    "device_for",
    "held",
    "joined",
    "load_recipe",
    "log_losses",
    "tracking_run_of",
    "train",
    "train_meta_seeds",
]
