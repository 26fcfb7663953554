"""Evaluation: methods on held-out tasks, by gradient evaluations."""

from metateleport.evaluation.attribution import attribution_of, words_of
from metateleport.evaluation.baselines import SCHEDULES, FirstOrder, GradientAscent
from metateleport.evaluation.lbfgs import LBFGS
from metateleport.evaluation.paired import PairedRatio, paired_ratio
from metateleport.evaluation.plot import plot
from metateleport.evaluation.recipes import BASELINES, REFERENCES
from metateleport.evaluation.report import report_of, write_report
from metateleport.evaluation.run import Evaluation, EvaluationError, Result, evaluate
from metateleport.evaluation.second_order import GaussNewton, PerTask
from metateleport.evaluation.table import table_of
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory, output_drift
from metateleport.evaluation.tuning import Choice, Lattice, Recipe, tune
from metateleport.evaluation.whitening import Whitening

__all__ = [
    "BASELINES",
    "LBFGS",
    "REFERENCES",
    "SCHEDULES",
    "Choice",
    "Evaluation",
    "EvaluationError",
    "FirstOrder",
    "GaussNewton",
    "GradientAscent",
    "Lattice",
    "Method",
    "PairedRatio",
    "PerTask",
    "Recipe",
    "Recorder",
    "Result",
    "Trajectory",
    "Whitening",
    "attribution_of",
    "evaluate",
    "output_drift",
    "paired_ratio",
    "plot",
    "report_of",
    "table_of",
    "tune",
    "words_of",
    "write_report",
]
