"""Runs of meta-training and evaluation in MLflow, and its registry of models; no room above imports it."""

from metateleport.tracking.evaluations import track_evaluation
from metateleport.tracking.fetch import fetch_checkpoint
from metateleport.tracking.registry import promote
from metateleport.tracking.runs import Run
from metateleport.tracking.store import TrackingError, check_tracking, require_mlflow, tracking_uri
from metateleport.tracking.sync import synchronise
from metateleport.tracking.trainings import TrackedTraining

__all__ = [
    "Run",
    "TrackedTraining",
    "TrackingError",
    "check_tracking",
    "fetch_checkpoint",
    "promote",
    "require_mlflow",
    "synchronise",
    "track_evaluation",
    "tracking_uri",
]
