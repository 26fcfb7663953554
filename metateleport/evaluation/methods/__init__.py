"""What is evaluated: the learned optimizer with its attribution, and its rivals."""

from metateleport.evaluation.methods.first_order import SCHEDULES, FirstOrder, GradientAscent
from metateleport.evaluation.methods.lbfgs import LBFGS
from metateleport.evaluation.methods.learned import ATTRIBUTIONS, Learned, learned_methods
from metateleport.evaluation.methods.registry import BASELINES, REFERENCES
from metateleport.evaluation.methods.second_order import GaussNewton, PerTask, soap
from metateleport.evaluation.methods.whitening import VARIANTS, Whitening

__all__ = [
    "ATTRIBUTIONS",
    "BASELINES",
    "LBFGS",
    "REFERENCES",
    "SCHEDULES",
    "VARIANTS",
    "FirstOrder",
    "GaussNewton",
    "GradientAscent",
    "Learned",
    "PerTask",
    "Whitening",
    "learned_methods",
    "soap",
]
