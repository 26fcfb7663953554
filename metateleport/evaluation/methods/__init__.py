"""The methods of an evaluation: the learned optimizer with its attribution, and its rivals."""

from metateleport.evaluation.methods.first_order import FirstOrder
from metateleport.evaluation.methods.gauss_newton import GaussNewton
from metateleport.evaluation.methods.gradient_ascent import SCHEDULES, GradientAscent
from metateleport.evaluation.methods.lbfgs import LBFGS
from metateleport.evaluation.methods.learned import ATTRIBUTIONS, Learned, learned_methods
from metateleport.evaluation.methods.registry import BASELINES, FAIR, REFERENCES, RIVALS
from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.methods.whitening import VARIANTS, Whitening

__all__ = [
    "ATTRIBUTIONS",
    "BASELINES",
    "DECAYS",
    "FAIR",
    "LBFGS",
    "REFERENCES",
    "RIVALS",
    "SCHEDULES",
    "VARIANTS",
    "FirstOrder",
    "GaussNewton",
    "GradientAscent",
    "Learned",
    "Scheduled",
    "Whitening",
    "learned_methods",
]
