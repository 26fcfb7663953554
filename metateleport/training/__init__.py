"""Meta-training through truncated, differentiable unrolls."""

from metateleport.training.config import TrainConfig, TrainingError, default_settings, device_for
from metateleport.training.meta_seeds import train_meta_seeds
from metateleport.training.progression import Progression
from metateleport.training.stack_optimizer import StackOptimizer
from metateleport.training.train import Interrupted, train
from metateleport.training.trainer import MetaTrainer
from metateleport.training.unroll import Unroll, log_losses

__all__ = [
    "Interrupted",
    "MetaTrainer",
    "Progression",
    "StackOptimizer",
    "TrainConfig",
    "TrainingError",
    "Unroll",
    "default_settings",
    "device_for",
    "log_losses",
    "train",
    "train_meta_seeds",
]
