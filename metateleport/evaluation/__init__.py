"""Evaluation: methods on held-out tasks at equal gradient evaluations, with tuning, attribution and reports."""

from metateleport.evaluation.ablation import ablated_methods, basis_of, parts_of, without
from metateleport.evaluation.attribution import attribution_of, words_of
from metateleport.evaluation.card import record_result
from metateleport.evaluation.fair import MEASURES, FairRules, tune_fairly
from metateleport.evaluation.jobs import run_plan
from metateleport.evaluation.marks import REFERENCE_MARKS, marks
from metateleport.evaluation.meta_seeds import meta_seeds_of
from metateleport.evaluation.methods.first_order import FirstOrder
from metateleport.evaluation.methods.gauss_newton import GaussNewton
from metateleport.evaluation.methods.gradient_ascent import SCHEDULES, GradientAscent
from metateleport.evaluation.methods.lbfgs import LBFGS
from metateleport.evaluation.methods.registry import BASELINES, FAIR, REFERENCES, RIVALS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.methods.whitening import Whitening
from metateleport.evaluation.paired import PairedRatio, paired_ratio, ratio_over_seeds
from metateleport.evaluation.plan import NO_CHECKPOINT, Bench, Plan, Unit
from metateleport.evaluation.plot import plot
from metateleport.evaluation.ranked import share_plan
from metateleport.evaluation.report import report_of, write_report
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.run import Evaluation, EvaluationError, Result, Seed, SeedResults, evaluate
from metateleport.evaluation.table import ratios_table_of, table_of
from metateleport.evaluation.target import Target, target_of
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory, output_drift
from metateleport.evaluation.tuning import tune
from metateleport.evaluation.words import ABLATED

__all__ = [
    "ABLATED",
    "BASELINES",
    "FAIR",
    "LBFGS",
    "MEASURES",
    "NO_CHECKPOINT",
    "REFERENCES",
    "REFERENCE_MARKS",
    "RIVALS",
    "SCHEDULES",
    "Bench",
    "Choice",
    "Evaluation",
    "EvaluationError",
    "FairRules",
    "FirstOrder",
    "GaussNewton",
    "GradientAscent",
    "Lattice",
    "Method",
    "PairedRatio",
    "Plan",
    "Recorder",
    "Result",
    "Rival",
    "Scheduled",
    "Seed",
    "SeedResults",
    "Target",
    "Trajectory",
    "Unit",
    "Whitening",
    "ablated_methods",
    "attribution_of",
    "basis_of",
    "evaluate",
    "marks",
    "meta_seeds_of",
    "output_drift",
    "paired_ratio",
    "parts_of",
    "plot",
    "ratio_over_seeds",
    "ratios_table_of",
    "record_result",
    "report_of",
    "run_plan",
    "share_plan",
    "table_of",
    "target_of",
    "tune",
    "tune_fairly",
    "without",
    "words_of",
    "write_report",
]
