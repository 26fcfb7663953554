"""Teleports in the inner loop of learn2learn's meta-learners, few-shot tasks, and meta-training on them."""

from metateleport.fewshot.adaptation import Adaptation, adapt, on_stack
from metateleport.fewshot.ascent import UnrolledAscentTeleporter
from metateleport.fewshot.episodes import Episode, Episodes
from metateleport.fewshot.learn2learn import MissingLearn2Learn
from metateleport.fewshot.learners import TeleportingLearner, TeleportingMAML, TeleportingMetaSGD
from metateleport.fewshot.omniglot import omniglot
from metateleport.fewshot.plain import maml, meta_curvature, meta_sgd
from metateleport.fewshot.tasks import FewShotFamily
from metateleport.fewshot.training import MetaTraining, MetaTrainingConfig, MetaTrainingError

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
