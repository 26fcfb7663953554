"""Experiments on the papers' claims about teleportation, each run by one command."""

from metateleport.papers.experiments.base import Claim, Experiment, ExperimentError, ExperimentResult, Findings, finite
from metateleport.papers.experiments.registry import EXPERIMENTS, load_experiment, summary_of

__all__ = [
    "EXPERIMENTS",
    "Claim",
    "Experiment",
    "ExperimentError",
    "ExperimentResult",
    "Findings",
    "finite",
    "load_experiment",
    "summary_of",
]
