"""Teleportation inside the inner loop of learn2learn's meta-learners, few-shot tasks, and their meta-training."""

from metateleport._learn2learn import MissingLearn2Learn
from metateleport.metalearning.ascent import UnrolledAscentTeleporter
from metateleport.metalearning.episodes import Episode, Episodes
from metateleport.metalearning.fewshot import FewShotFamily
from metateleport.metalearning.learners import TeleportingLearner, TeleportingMAML, TeleportingMetaSGD
from metateleport.metalearning.omniglot import omniglot
from metateleport.metalearning.plain import maml, meta_curvature, meta_sgd
from metateleport.metalearning.stacks import Adaptation, adapt, on_stack
from metateleport.metalearning.training import MetaTraining, MetaTrainingConfig, MetaTrainingError

__all__ = [
    "Adaptation",
    "Episode",
    "Episodes",
    "FewShotFamily",
    "MetaTraining",
    "MetaTrainingConfig",
    "MetaTrainingError",
    "MissingLearn2Learn",
    "TeleportingLearner",
    "TeleportingMAML",
    "TeleportingMetaSGD",
    "UnrolledAscentTeleporter",
    "adapt",
    "maml",
    "meta_curvature",
    "meta_sgd",
    "omniglot",
    "on_stack",
]
